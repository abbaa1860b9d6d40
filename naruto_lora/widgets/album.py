"""Sets of pictures on disk, one prompt and seed drawn by several models; and the favourites among them."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from PIL import Image

from .. import files
from ..reading.picture import loaded

Kinds = dict[str, type | tuple[type, ...]]
NEEDED: Kinds = {"id": str, "prompt": str, "seed": int, "pictures": dict}  # what a set must have
SETTINGS: Kinds = {"steps": int, "guidance_scale": (int, float), "scheduler": str, "resolution": int}  # may have


class Album:
    """A folder of PNGs; sets.jsonl with one line a set (odd or incomplete lines are skipped); favourites.json.

    A set is {"id", "prompt", "seed", ..., "pictures": {label: file name}}; the newest is last.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        files.make_folder(self.folder)
        self.sets = {row["id"]: row for row in files.read_lines(self.folder / "sets.jsonl") if self._is_complete(row)}
        self.favourites = set(self._read_favourites())

    def _is_complete(self, row: dict) -> bool:
        kinds = NEEDED | {key: kind for key, kind in SETTINGS.items() if key in row}
        return all(isinstance(row.get(key), kind) for key, kind in kinds.items()) and bool(row["pictures"]) and all(
            isinstance(name, str) and Path(name).name == name and os.path.isfile(self.folder / name)
            for name in row["pictures"].values()
        )

    def _read_favourites(self) -> list[str]:
        try:
            found = json.loads((self.folder / "favourites.json").read_bytes())
        except (OSError, ValueError, RecursionError):
            return []
        return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []

    def add(self, settings: dict, drawn: dict[str, Image.Image]) -> str:
        """Saves a set; returns its id, a hash of its settings and labels. Raises OSError."""
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
        return {label: loaded(self.folder / file) for label, file in self.sets[name]["pictures"].items()}

    def set_favourite(self, name: str, favourite: bool = True) -> None:
        """Adds a set to the favourites, or removes it from them. Raises OSError."""
        self.favourites = self.favourites | {name} if favourite else self.favourites - {name}
        text = json.dumps(sorted(self.favourites))
        files.replace(self.folder / "favourites.json", lambda path: path.write_text(text, encoding="utf-8"))


def _save(picture: Image.Image, path: Path) -> None:
    """Saves a PNG; with the picture's settings as metadata, if it has them (those of `pipeline.draw` do)."""
    if "settings" in picture.info:
        from .. import gallery

        gallery.save(picture, path)
    else:
        files.replace(path, lambda temporary: picture.save(temporary, "PNG"))


def append_line(file: Path, row: dict) -> None:
    """Appends one object and flushes it to the disk; after an incomplete line on a new line."""
    text = json.dumps(row, ensure_ascii=False) + "\n"
    if file.exists() and not file.read_bytes().endswith(b"\n"):
        text = "\n" + text
    with open(file, "a", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
