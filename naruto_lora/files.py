"""Atomic files: written under a temporary name, flushed to the disk, then renamed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, is_dataclass
from pathlib import Path


class Unwritable(OSError):
    """A file that can't be written; `strerror` is the disk's own reason."""

    def __str__(self) -> str:
        return f"'{self.filename}' can't be written ({self.strerror}): make room there, or choose another folder"


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write(temporary)`, flushes that file and renames it to `path`: a kill leaves the old file or the new one.

    Raises what `write` raises, and Unwritable for a full or read-only disk; it then removes the temporary file.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.writing")
    try:
        write(temporary)
        flush(temporary)
        temporary.replace(path)
    except OSError as error:
        raise Unwritable(error.errno, error.strerror or str(error), str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def copy_whole(source: Path, target: Path) -> None:
    """Copies a file atomically. Raises OSError, also if the copy does not read back equal."""

    def write(temporary: Path) -> None:
        shutil.copyfile(source, temporary)
        flush(temporary)
        if sha256(temporary) != sha256(source):
            raise OSError(f"the copy of '{source}' to '{target}' does not read back as it was written")

    replace(target, write)


def flush(path: Path) -> None:
    """Flushes a file, or a folder's entries, to the disk. Windows can't open folders, Google Drive can't flush them."""
    if path.is_file():  # the umask's mode: safetensors hides its files from other users
        os.umask(mask := os.umask(0o077))
        with suppress(OSError):  # Google Drive has modes of its own
            path.chmod(0o666 & ~mask)
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
    """The SHA-256 of a file's content, 64 hex digits."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def make_folder(folder: Path) -> None:
    """Creates `folder`. Raises PermissionError if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.write_bytes(b"1")
        probe.unlink(missing_ok=True)  # another process may be trying the same
    except OSError as error:
        reason = error.strerror or error
        raise PermissionError(f"can't write to the output folder '{folder}' ({reason}); choose another") from None


def write_json(path: str | Path, content: dict) -> Path:
    """Writes `content` (dataclasses and arrays too) as JSON, atomically; creates the folder; returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1, default=_plain)
    replace(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return path


def _plain(value):
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    return str(value)


def read_json(path: str | Path) -> dict:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def read_lines(file: Path) -> list[dict]:
    """The objects of a JSON lines file; none if there is no file. Odd or incomplete lines are skipped."""
    try:
        lines = file.read_bytes().splitlines()  # only at \n and \r: text may contain other line breaks
    except FileNotFoundError:
        return []
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    return [row for row in rows if isinstance(row, dict)]
