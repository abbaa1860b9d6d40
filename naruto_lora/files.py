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
        flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def copy_whole(source: Path, target: Path) -> None:
    """Copies a file so that `target` is whole or not there. Raises OSError, also if it reads back as another file."""

    def write(temporary: Path) -> None:
        shutil.copyfile(source, temporary)
        flush(temporary)
        if sha256(temporary) != sha256(source):
            raise OSError(f"the copy of '{source}' to '{target}' does not read back as it was written")

    replace(target, write)


def flush(path: Path) -> None:
    """Sees a file, or a folder's entries, onto the disk. Windows opens no folders, and Drive flushes none."""
    try:
        handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    except PermissionError:
        if path.is_file():
            raise
        return
    try:
        os.fsync(handle)
    except OSError:
        if path.is_file():
            raise
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """The 64 hex digits of a file's content."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def writable(folder: Path) -> None:
    """Makes `folder`. Raises PermissionError if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.write_bytes(b"1")
        os.remove(probe)
    except OSError as error:
        reason = error.strerror or error
        raise PermissionError(f"can't write to the output folder '{folder}' ({reason}); choose another") from None


def tell(show, text: str) -> None:
    """One line of news: to `show.note` if there is one, else printed."""
    getattr(show, "note", print)(text)
