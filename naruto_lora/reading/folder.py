"""Captioned pictures in a folder: captions in metadata.jsonl, or in a .txt file beside each picture."""

from __future__ import annotations

import json
import re
import reprlib
from pathlib import Path
from typing import Any

from .captions import Missing

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
NO_TEXT = re.compile("[\0\ud800-\udfff]")  # NUL, and halves of a letter that JSON can hold
Row = tuple[str, Any, Path | bytes]  # a picture's name, its caption (unchecked), its file or compressed bytes


def read(folder: Path) -> list[Row]:
    """(name, caption, file) of each picture in `folder`; `captions.Missing` where there is no caption."""
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and _visible(p, folder))
    captions = _metadata(folder / "metadata.jsonl") if (folder / "metadata.jsonl").is_file() else None
    rows: list[Row] = []
    for file in files:
        name = file.relative_to(folder).as_posix()
        caption = captions.get(name) if captions is not None else _caption_beside(file)
        if caption is None:
            where = "in metadata.jsonl" if captions is not None else f"in '{file.with_suffix('.txt').name}' beside it"
            caption = Missing(f"the picture {name!r} in '{folder}' has no caption; add one {where}")
        rows.append((name, caption, file))
    for name in sorted(set(captions or ()) - {name for name, *_ in rows}):
        raise ValueError(f"metadata.jsonl in '{folder}' names {name!r}, which is not there; add it or remove the line")
    return rows


def _visible(file: Path, folder: Path) -> bool:
    return file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)


def _caption_beside(file: Path) -> str | None:
    text = file.with_suffix(".txt")
    return _read_text(text).strip() if text.is_file() else None


def _read_text(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:  # UTF-16 without a mark reads as letters with NULs between them
        raise ValueError(f"the file '{file}' is not in UTF-8; save it again as UTF-8")
    return text


def _metadata(file: Path) -> dict[str, Any]:
    captions: dict[str, Any] = {}
    for number, line in enumerate(_read_text(file).split("\n"), 1):
        if not line.strip():
            continue
        name, caption = _entry(line, f"line {number} of '{file}'")
        if name in captions:
            raise ValueError(f"line {number} of '{file}' names {name!r} a second time; keep one of its lines")
        captions[name] = caption
    return captions


def _entry(line: str, where: str) -> tuple[str, Any]:
    """(file name, caption) of a line of metadata.jsonl; the caption is unchecked unless it is a text."""
    try:
        row = json.loads(line)
        name, caption = row["file_name"], "" if row["text"] is None else row["text"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{where} must be one JSON object with 'file_name' and 'text'") from None
    if not isinstance(name, str):
        raise ValueError(f"{where} has a 'file_name' that is not text but {reprlib.repr(name)}; write it as text")
    for text in (name, caption):
        if isinstance(text, str) and (found := NO_TEXT.search(text)):
            raise ValueError(f"{where} holds {found[0]!r}, which is no letter; write the line again in UTF-8")
    return name, caption
