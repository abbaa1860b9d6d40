"""Files that are whole or not there: written beside, flushed, renamed; and one line of news for who watches."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """`write(temporary)` beside `path`, flushed to the disk, then renamed to it: a kill leaves the old file or the new.

    Raises what `write` raises, and OSError for a full or read-only disk; nothing half written stays.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.writing")
    try:
        write(temporary)
        _flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def copy_whole(source: Path, target: Path) -> None:
    """Copies a file so that `target` is whole or not there. Raises OSError, also if it reads back as another file."""

    def write(temporary: Path) -> None:
        shutil.copyfile(source, temporary)
        _flush(temporary)
        if temporary.stat().st_size != source.stat().st_size or _digest(temporary) != _digest(source):
            raise OSError(f"the copy of '{source}' to '{target}' does not read back as it was written")

    replace(target, write)


def _flush(path: Path) -> None:
    with open(path, "rb+") as handle:
        os.fsync(handle.fileno())


def _digest(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def tell(show, text: str) -> None:
    """One line of news: to `show.note` if there is one, else printed."""
    getattr(show, "note", print)(text)
