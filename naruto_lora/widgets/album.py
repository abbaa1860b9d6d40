"""Drawn sets on disk: one prompt and seed through several models, to browse without a GPU and to keep favourites."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from PIL import Image

from .. import files


class Album:
    """A folder of PNGs and sets.jsonl, a line a set; favourites.json names the kept ones. Half a line is passed over.

    A set is {"id", "prompt", "seed", ..., "pictures": {label: file name}}; the newest stands last.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        files.writable(self.folder)
        self.sets = {row["id"]: row for row in read_lines(self.folder / "sets.jsonl") if self._whole(row)}
        self.favourites = set(self._kept())

    def _whole(self, row: dict) -> bool:
        pictures = row.get("pictures") or {"": ""}
        return "id" in row and all((self.folder / name).is_file() for name in pictures.values())

    def _kept(self) -> list[str]:
        try:
            return json.loads((self.folder / "favourites.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return []

    def add(self, settings: dict, drawn: dict[str, Image.Image]) -> str:
        """Saves a set; returns its id, which the settings and labels decide. Raises OSError."""
        content = json.dumps([settings, list(drawn)], sort_keys=True)
        name = hashlib.sha256(content.encode()).hexdigest()[:12]
        pictures = {label: f"{name}-{k}.png" for k, label in enumerate(drawn)}
        for label, picture in drawn.items():
            _save(picture, self.folder / pictures[label])
        if name not in self.sets:
            row = {"id": name} | settings | {"pictures": pictures}
            append_line(self.folder / "sets.jsonl", row)
            self.sets[name] = row
        return name

    def pictures(self, name: str) -> dict[str, Image.Image]:
        """{label: picture} of a set."""
        return {label: Image.open(self.folder / file) for label, file in self.sets[name]["pictures"].items()}

    def keep(self, name: str, kept: bool = True) -> None:
        """Makes a set a favourite, or no more. Raises OSError."""
        self.favourites = self.favourites | {name} if kept else self.favourites - {name}
        text = json.dumps(sorted(self.favourites))
        files.replace(self.folder / "favourites.json", lambda path: path.write_text(text, encoding="utf-8"))


def _save(picture: Image.Image, path: Path) -> None:
    """As a PNG, with what it was drawn from inside if it says so (`pipeline.draw`'s do)."""
    if "drawn" in picture.info:
        from .. import gallery

        gallery.save(picture, path)
    else:
        files.replace(path, lambda temporary: picture.save(temporary, "PNG"))


def read_lines(file: Path) -> list[dict]:
    """The objects of a JSON lines file; none if it isn't there; a line that a kill cut short is passed over."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return [row for row in rows if isinstance(row, dict)]


def append_line(file: Path, row: dict) -> None:
    """Adds one object, on the disk before it returns. A line cut short before it stays a line of its own."""
    text = json.dumps(row, ensure_ascii=False) + "\n"
    if file.exists() and not file.read_bytes().endswith(b"\n"):
        text = "\n" + text
    with open(file, "a", encoding="utf-8") as handle:
        handle.write(text)
    files.flush(file)
