"""Captions kept beside a data set: for pictures whose own caption can't be written, and who wrote each caption.

A file of JSON lines, `captions.jsonl`, lies in a folder of pictures, `my.zip.captions.jsonl` beside a zip; for a hub
id or a folder that can't be written it lies in the user's cache folder. A line is one picture: `file_name`, `sha256`
(16 digits, of the compressed picture), `text`, `by` (a captioner's name, or YOU), `here` (whether this text counts in
place of what the data set's own files say) and, where a caption was replaced, `before`. A picture's last line counts.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from .. import files
from . import words

FILE = "captions.jsonl"  # hidden beside parquet: the `datasets` library would read it as a table
YOU, NO_WORDS = "you", "none"  # `by`: written in the review; the mode in which every caption is empty


@dataclass(frozen=True)
class Missing:
    """What a reader gives in place of a caption; `error` is the sentence for who trains without one."""

    error: str


def place(dataset: str | Path) -> Path:
    """The file with the captions of a data set: where it is, or else where it can be written."""
    path = Path(dataset).expanduser()
    own = None
    if path.is_dir():
        own = path / (f".{FILE}" if next(path.rglob("*.parquet"), None) else FILE)
    elif path.is_file():
        own = path.with_name(f"{path.name}.{FILE}")
    key = hashlib.sha256(str(path.resolve() if own else dataset).encode()).hexdigest()[:16]
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    other = Path(root, "naruto_lora", "captions", f"{key}.jsonl")
    if own and (own.is_file() or (os.access(own.parent, os.W_OK) and not other.is_file())):
        return own
    return other


class Captions:
    """The lines of a data set's captions file; `file` is where they are. Raises OSError if they can't be read."""

    def __init__(self, dataset: str | Path, file: Path | None = None):
        self.file = file or place(dataset)
        self.rows = {_key(row): row for row in _lines(self.file)}

    def __len__(self) -> int:
        return len(self.rows)

    def get(self, example) -> dict | None:
        """The line of an example (`data.Example`), if there is one for these bytes under this name."""
        return self.rows.get((example.name, short(example))) if self.rows else None

    def put(self, rows: Iterable[dict]) -> None:
        """Appends lines of `row`, flushed to the disk. Raises OSError."""
        rows = list(rows)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        whole = not self.file.exists() or self.file.read_bytes()[-1:] in (b"", b"\n")
        with open(self.file, "a", encoding="utf-8") as handle:
            handle.write(text if whole else f"\n{text}")  # after a line that a kill cut short
            handle.flush()
            os.fsync(handle.fileno())
        self.rows |= {_key(row): row for row in rows}

    def rewrite(self, rows: Iterable[dict]) -> None:
        """Replaces all lines. Raises OSError."""
        keyed = {_key(row): row for row in rows}
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in keyed.values())
        self.file.parent.mkdir(parents=True, exist_ok=True)
        files.replace(self.file, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        self.rows = keyed


def row(example, text: str, by: str, here: bool, before: str = "") -> dict:
    """A line of the file."""
    line = {"file_name": example.name, "sha256": short(example), "text": text, "by": by, "here": here}
    return line | {"before": before} if before else line


def short(example) -> str:
    """16 hex digits of the compressed picture's SHA-256."""
    return example.digest.hex()[:16]


def apply(examples: list, dataset: str | Path, captioned: bool = True) -> list:
    """The examples of a data set with the captions that are kept beside it.

    A caption that is kept as empty makes an example `wordless`. Raises ValueError for an example without a caption;
    with `captioned` False it is `wordless` too.
    """
    kept = [line for line in Captions(dataset).rows.values() if line["here"]]
    texts, names = {_key(line): line["text"] for line in kept}, {line["file_name"] for line in kept}
    found = []
    for example in examples:
        text = texts.get((example.name, short(example))) if example.name in names else None  # else no bytes are read
        if text is not None:
            known, example = example, replace(example, caption=text, wordless=not text.strip())
            example.__dict__["digest"] = known.digest  # not to be read again
        elif not captioned and (isinstance(example.caption, Missing) or words.is_empty(example.caption)):
            example = replace(example, caption="", wordless=True)
        elif isinstance(example.caption, Missing):
            raise ValueError(f"{example.caption.error}, or have it written: python -m naruto_lora caption '{dataset}'")
        found.append(example)
    return found


def _key(line: dict) -> tuple[str, str]:
    return line["file_name"], line["sha256"]


def _lines(file: Path) -> list[dict]:
    """The whole lines of a captions file; none if there is no file. A line that a kill cut short is left out."""
    return [line for line in files.read_lines(file) if _is_whole(line)]


def _is_whole(line: object) -> bool:
    kinds = {"file_name": str, "sha256": str, "text": str, "by": str, "here": bool}
    return isinstance(line, dict) and all(isinstance(line.get(name), kind) for name, kind in kinds.items())
