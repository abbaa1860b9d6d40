"""Captions in metadata.jsonl and metadata.csv, each for the pictures in its folder and below."""

from __future__ import annotations

import csv
import io
import json
import reprlib
from pathlib import Path
from typing import Any

from . import names, words
from .report import Found

FILES = ("metadata.jsonl", "metadata.csv")
COLUMNS = ("text", "caption", "prompt")  # where a caption is; the first that is there counts
Captions = dict[Path, tuple[Any, str]]  # by picture: its caption (unchecked, or a text), the file that holds it


class Metadata:
    """Every metadata file among a folder's files, matched with its pictures; `of` has their captions.

    Of two files that speak of one picture, the one nearer to it counts. Raises ValueError for a file that can't be
    read, with its line.
    """

    def __init__(self, folder: Path, files: list[Path], pictures: list[Path], found: Found):
        self.folder, self.found, self.of, self.absent = folder, found, Captions(), list[tuple[str, Path]]()
        self.names: dict[Path, str] = {}
        self.exact = {self.name(file): file for file in pictures}
        self.plain = {names.plain(name): file for name, file in self.exact.items()}
        self.files = [file for file in files if file.name.lower() in FILES]
        for file in sorted(self.files, key=lambda file: (-len(file.parts), file.suffix.lower() == ".csv", file)):
            for name, caption in _read(file, found, self.name(file)).items():
                self._take(file, name, caption)

    def check(self) -> None:
        """Raises ValueError for a file that a row names and that is not there."""
        for name, file in sorted(self.absent):
            where = f"{file.name} in '{file.parent}'"
            raise ValueError(f"{where} names {name!r}, which is not there; add it or remove the line")

    def name(self, file: Path) -> str:
        """A file's name in the data set's folder."""
        if file not in self.names:
            self.names[file] = file.relative_to(self.folder).as_posix()
        return self.names[file]

    def _take(self, file: Path, name: str, caption: Any) -> None:
        picture, where = self._picture(file, name), self.name(file)
        if picture is None:
            if _is_file(other := file.parent / names.plain(name)):
                self.found.leave(f"named in {where} but of a kind that isn't read", self.name(other))
            else:
                self.absent.append((name, file))
        elif picture not in self.of:
            self.of[picture] = caption, where
        elif self.of[picture][0] != caption:
            self.found.differ(self.of[picture][1], where, self.name(picture))

    def _picture(self, file: Path, name: str) -> Path | None:
        base = self.name(file).removesuffix(file.name)
        if base + name in self.exact:
            return self.exact[base + name]
        for form in (names.plain(name), *(() if name.isascii() and len(name) < names.LONGEST else names.others(name))):
            if (key := names.plain(base + form)) in self.plain:
                return self.plain[key]
        return None


def _is_file(file: Path) -> bool:
    try:
        return file.is_file()
    except (OSError, ValueError):  # a name that no disk takes
        return False


def _read(file: Path, found: Found, where: str) -> dict[str, Any]:
    rows = _table(file, found, where) if file.suffix.lower() == ".csv" else _lines(file)
    captions: dict[str, Any] = {}
    for number, name, caption in rows:
        if name in captions:
            raise ValueError(f"line {number} of '{file}' names {name!r} a second time; keep one of its lines")
        captions[name] = caption
    return captions


def _lines(file: Path) -> list[tuple[int, str, Any]]:
    """(line, file name, caption) of each line of a metadata.jsonl."""
    rows = []
    for number, line in enumerate(words.read(file).split("\n"), 1):
        if line.strip():
            rows.append((number, *_entry(line, f"line {number} of '{file}'")))
    return rows


def _entry(line: str, where: str) -> tuple[str, Any]:
    """(file name, caption) of a line of metadata.jsonl; the caption is unchecked unless it is a text."""
    try:
        row = json.loads(line)
        caption = next(row[column] for column in COLUMNS if column in row)
        name, caption = row["file_name"], "" if caption is None else caption
    except (ValueError, KeyError, TypeError, RecursionError, StopIteration):
        raise ValueError(f"{where} must be one JSON object with 'file_name' and 'text'") from None
    if not isinstance(name, str):
        raise ValueError(f"{where} has a 'file_name' that is not text but {reprlib.repr(name)}; write it as text")
    _check(name, caption, where)
    return name, caption


def _check(name: str, caption: Any, where: str) -> None:
    for text in (name, caption):
        if isinstance(text, str) and (found := words.NO_TEXT.search(text)):
            raise ValueError(f"{where} holds {found[0]!r}, which is no letter; write the line again in UTF-8")


def _table(file: Path, found: Found, where: str) -> list[tuple[int, str, Any]]:
    """(line, file name, caption) of each row of a metadata.csv; none, and a word, if it is about something else."""
    text = words.read(file)
    head = text.lstrip().split("\n", 1)[0]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=head.count), strict=True)
    try:
        rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num} of '{file}' can't be read ({error}); mend it") from None
    columns = [column.strip() for column in rows[0][1]] if rows else []
    caption = next((columns.index(column) for column in COLUMNS if column in columns), None)
    if "file_name" not in columns or caption is None:
        found.leave("without columns 'file_name' and 'text'", where)
        return []
    name, result = columns.index("file_name"), []
    for number, row in rows[1:]:
        if len(row) != len(columns):
            raise ValueError(f"line {number} of '{file}' has {len(row)} columns, not {len(columns)}; put text with "
                             "commas into quotes")  # fmt: skip
        _check(row[name], row[caption], f"line {number} of '{file}'")
        result.append((number, row[name], row[caption]))
    return result
