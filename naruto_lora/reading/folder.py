"""Captioned pictures in a folder: captions in metadata.jsonl, or in a .txt file beside each picture."""

from __future__ import annotations

import json
from pathlib import Path

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
Row = tuple[str, object, Path | bytes]  # a picture's name, its caption (unchecked), its file or compressed bytes


def read(folder: Path) -> list[Row]:
    """(name, caption, file) of each picture in `folder`. Raises ValueError for one without a caption."""
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and _visible(p, folder))
    captions = _metadata(folder / "metadata.jsonl") if (folder / "metadata.jsonl").is_file() else None
    rows = []
    for file in files:
        name = file.relative_to(folder).as_posix()
        caption = captions.get(name) if captions is not None else _caption_beside(file)
        if caption is None:
            where = "in metadata.jsonl" if captions is not None else f"in '{file.with_suffix('.txt').name}' beside it"
            raise ValueError(f"the picture '{name}' in '{folder}' has no caption; add one {where}")
        rows.append((name, caption, file))
    for name in sorted(set(captions or ()) - {name for name, *_ in rows}):
        raise ValueError(f"metadata.jsonl in '{folder}' names '{name}', which is not there; add it or remove the line")
    return rows


def _visible(file: Path, folder: Path) -> bool:
    return file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)


def _caption_beside(file: Path) -> str | None:
    text = file.with_suffix(".txt")
    return _read_text(text).strip() if text.is_file() else None


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"the file '{file}' is not in UTF-8; save it again as UTF-8") from None


def _metadata(file: Path) -> dict[str, str]:
    captions = {}
    for number, line in enumerate(_read_text(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            captions[row["file_name"]] = "" if row["text"] is None else row["text"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"line {number} of '{file}' must be one JSON object with 'file_name' and 'text'"
            ) from None
    return captions
