"""Captioned pictures in a folder: captions in metadata files, or in a text file beside each picture."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any, NamedTuple

from ..hub import PICTURES as SUFFIXES
from . import kohya, metadata, tree, words
from .captions import FILE as OWN
from .captions import Missing
from .report import Found

TEXTS = (".txt", ".caption")  # endings of files with the caption of the picture beside them
ARCHIVES = (".zip", ".rar", ".7z", ".tar", ".gz", ".tgz", ".bz2", ".xz")
PACKED = "an archive inside, which must be unpacked there"


class Row(NamedTuple):
    """A picture's name, its caption (unchecked), its file or compressed bytes, and how often it is trained."""

    name: str
    caption: Any
    source: Path | bytes
    repeats: int = 1


def read(folder: Path, found: Found, files: list[Path] | None = None) -> list[Row]:
    """(name, caption, file) of each picture in `folder`; `captions.Missing` where there is no caption.

    `files` are those of `tree.files`, if they are known.
    """
    files = tree.files(folder, found) if files is None else files
    pictures = [file for file in files if is_picture(file)]
    known, beside = metadata.Metadata(folder, files, pictures, found), _texts(files)
    texts = {file: _at(beside, file.with_suffix("")) + _at(beside, file) for file in pictures}
    rows: list[Row] = []
    for file, repeats in kohya.repeats(folder, pictures, found).items():
        caption, where = _caption(file, known, texts[file], found)
        if caption is None:
            where = f"in {known.files[0].name}" if known.files else f"in '{file.with_suffix('.txt').name}' beside it"
            caption = Missing(f"the picture {known.name(file)!r} in '{folder}' has no caption; add one {where}")
        else:
            found.captions[where] += 1
        rows.append(Row(known.name(file), caption, file, repeats))
    known.check()
    used = {*pictures, *known.files, *(text for file in pictures for text in texts[file])}
    _leave([(file, known.name(file)) for file in files if file not in used], found)
    return rows


def is_picture(file: Path) -> bool:
    """Whether a file's ending is that of a picture."""
    return file.suffix.lower() in SUFFIXES


def _caption(file: Path, known: metadata.Metadata, texts: list[Path], found: Found) -> tuple[Any, str]:
    """(caption, where it was), None for none. Metadata counts before a file beside the picture, unless it is empty."""
    said = [known.of[file]] if file in known.of else []
    for text in texts:
        try:
            said.append((words.read(text).strip(), f"{text.suffix.lower()} files"))
        except ValueError:
            if not said:
                raise
            found.leave("not in UTF-8", known.name(text))
    (caption, where), *others = [one for one in said if not words.is_empty(one[0])] or said[:1] or [(None, "")]
    for other, place in others:
        if other != (caption.strip() if isinstance(caption, str) else caption):
            found.differ(where, place, known.name(file))
    return caption, where


def _texts(files: list[Path]) -> dict[Path, list[Path]]:
    """By picture without its ending, and with it: the text files beside it, in the order of TEXTS."""
    beside: dict[Path, list[Path]] = {}
    for file in sorted(files, key=lambda file: (file.suffix.lower() != TEXTS[0], file.suffix)):
        if file.suffix.lower() in TEXTS:
            beside.setdefault(_composed(file.with_suffix("")), []).append(file)
    return beside


def _at(beside: dict[Path, list[Path]], file: Path) -> list[Path]:
    return beside.get(_composed(file), [])


def _composed(file: Path) -> Path:
    return file.with_name(unicodedata.normalize("NFC", file.name))


def _leave(files: list[tuple[Path, str]], found: Found) -> None:
    named = found.named
    for file, name in files:
        suffix = file.suffix.lower()
        if file.name.removeprefix(".") == OWN:
            continue
        if suffix in TEXTS:
            found.leave("text beside no picture", name)
        elif suffix in ARCHIVES:
            found.leave(PACKED, name)
        elif suffix == ".parquet":
            found.leave("a table without pictures and captions", name)
        elif name not in named:
            found.leave("neither a picture nor captions", name)
