"""Where a caption is written: into metadata.jsonl, beside its picture, or into the file kept beside the data set."""

from __future__ import annotations

import collections
import json
import os
from collections.abc import Iterable
from pathlib import Path

from .. import files
from ..reading import captions
from ..reading.metadata import COLUMNS

BESIDE = (".txt", ".caption", ".TXT")


class Places:
    """Writes captions of a data set's `examples`, one by one, each whole or not at all."""

    def __init__(self, dataset: str | Path, examples: Iterable):
        folder = Path(os.path.abspath(os.path.expanduser(dataset)))
        table = folder.is_dir() and next(folder.rglob("*.parquet"), None)  # whose captions are in it
        self.folder = folder if folder.is_dir() and not table else None
        self.kept = captions.Captions(dataset)
        sources = [self._file(example) for example in examples]
        self.stems = collections.Counter(source.with_suffix("") for source in sources if source)

    def write(self, example, text: str, by: str, before: str = "", **more) -> dict:
        """Writes a caption where the reader finds it; returns its line for `kept.put`. Raises OSError.

        A caption that the data set's own files can't take, such as those of a zip, and an empty one, count from
        that line alone (`here`), so that it must be put.
        """
        here = not text or not self._write(example, text)
        return captions.row(example, text, by, here, before) | more

    def remove(self, example) -> None:
        """Takes a caption away, so that the picture has none. Raises OSError."""
        if self.kept.get(example):
            self.kept.rewrite([row for row in self.kept.rows.values() if row != self.kept.get(example)])
        if (file := self._file(example)) is None:
            return
        if (listing := self._listing(file)) is not None:
            if listing.suffix == ".jsonl":
                _into_metadata(listing, file, "")
        elif self.stems[file.with_suffix("")] == 1:
            _beside(file).unlink(missing_ok=True)

    def _file(self, example) -> Path | None:
        """The example's file if the data set is a folder of pictures; None for a table, a zip or a hub id."""
        if self.folder is None or isinstance(example.source, bytes):
            return None
        return Path(os.path.abspath(example.source))

    def _write(self, example, text: str) -> bool:
        """Whether the data set's own files took the caption."""
        file = self._file(example)
        if file is None or not os.access(file.parent, os.W_OK):
            return False
        if (listing := self._listing(file)) is not None:
            return listing.suffix == ".jsonl" and _into_metadata(listing, file, text)
        if self.stems[file.with_suffix("")] > 1:  # 'a.png' and 'a.jpg' would share 'a.txt'
            return False
        files.replace(_beside(file), lambda temporary: temporary.write_text(text, encoding="utf-8"))
        return True

    def _listing(self, picture: Path) -> Path | None:
        """The metadata file for a picture: the nearest one at or above it, up to the data set's folder."""
        for folder in picture.parents:
            for name in ("metadata.jsonl", "metadata.csv"):
                if (folder / name).is_file():
                    return folder / name
            if folder == self.folder:
                return None
        return None


def _beside(picture: Path) -> Path:
    """The file of a picture's caption: the one that is there, or a new .txt."""
    found = [picture.with_suffix(suffix) for suffix in BESIDE]
    found += [picture.with_name(picture.name + suffix) for suffix in BESIDE]
    return next((file for file in found if file.is_file()), found[0])


def _into_metadata(listing: Path, picture: Path, text: str) -> bool:
    """Sets a picture's caption in a metadata.jsonl and leaves its other lines as they are; whether that could be."""
    name, lines, done = picture.relative_to(listing.parent).as_posix(), [], False
    for line in listing.read_text(encoding="utf-8-sig").split("\n"):
        try:
            row = json.loads(line)
            same = os.path.normpath(row["file_name"].replace("\\", "/")) == os.path.normpath(name)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            row, same = None, False
        if same:
            column = next((column for column in COLUMNS if column in row), COLUMNS[0])
            line, done = json.dumps(row | {column: text}, ensure_ascii=False), True
        lines.append(line)
    if not done:
        while lines and not lines[-1].strip():
            lines.pop()
        lines += [json.dumps({"file_name": name, "text": text}, ensure_ascii=False), ""]
    files.replace(listing, lambda temporary: temporary.write_text("\n".join(lines), encoding="utf-8"))
    return True
