"""Files that are whole or not there: flushed, checked, renamed into place."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def sha256(path: Path) -> str:
    """The 64 hex digits of a file's content."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Sees a file, or a folder's entries, onto the disk; where a folder can't be flushed, that is left out."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders
        return
    try:
        os.fsync(handle)
    except OSError:
        if path.is_file():
            raise
    finally:
        os.close(handle)


def copy_whole(source: Path, target: Path) -> None:
    """Copies a file beside `target`, reads it back, and only then renames it. Raises OSError."""
    temporary = target.with_name(f".copying-{target.name}")
    with open(source, "rb") as read, open(temporary, "wb") as write:
        while block := read.read(2**20):
            write.write(block)
        write.flush()
        os.fsync(write.fileno())
    if sha256(temporary) != sha256(source):
        temporary.unlink()
        raise OSError(f"'{target}' did not come out as it was written")
    temporary.replace(target)


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
    """One line to whoever watches: `show.note` if it has one, else printed."""
    getattr(show, "note", print)(text)
