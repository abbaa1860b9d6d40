"""Files that are whole or not there: written beside, flushed, renamed; and one line of news for who watches."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

UNZIPPED = 40e9  # bytes that a zip may hold


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


def unzip(archive: Path) -> Path:
    """The folder with a zip's content, unpacked once into the user's cache, by what it holds.

    Names that lead out of the folder, links and hidden files are left out; a single folder at the top is entered.
    Raises FileNotFoundError, ValueError for a damaged, encrypted or far too large one, OSError for a full disk.
    """
    if not archive.is_file():
        raise FileNotFoundError(f"the file '{archive}' does not exist; check the path")
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "naruto_lora"
    target = root / sha256(archive)[:16]
    if not target.is_dir():
        root.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=root, prefix=".unpacking-"))
        try:
            _extract(archive, temporary)
            if not target.is_dir():  # another process may have been faster
                os.replace(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    inside = list(target.iterdir())
    return inside[0] if len(inside) == 1 and inside[0].is_dir() else target


def _extract(archive: Path, folder: Path) -> None:
    try:
        with zipfile.ZipFile(archive) as opened:
            wanted = [entry for entry in opened.infolist() if _plain_file(entry)]
            size, free = sum(entry.file_size for entry in wanted), shutil.disk_usage(folder).free
            if size > min(UNZIPPED, free - 2**30):
                raise ValueError(
                    f"the zip '{archive}' holds {size / 1e9:.1f} GB: more than {UNZIPPED / 1e9:.0f} GB, or than the "
                    f"disk's {free / 1e9:.1f} GB leave room for; take a smaller one"
                )
            for entry in wanted:
                opened.extract(entry, folder)
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, zlib.error, EOFError) as error:
        raise ValueError(f"the zip '{archive}' can't be unpacked ({error}); make it anew, without a password") from None


def _plain_file(entry: zipfile.ZipInfo) -> bool:
    """Whether a zip's entry is a visible file within the folder that it is unpacked into."""
    parts = entry.filename.replace("\\", "/").split("/")
    outside = entry.filename.startswith(("/", "\\")) or any(part == ".." or ":" in part for part in parts)
    hidden = any(part.startswith(".") for part in parts) or parts[0] == "__MACOSX"
    link = entry.external_attr >> 28 == 0xA  # the file's kind in Unix' mode bits
    return not (entry.is_dir() or outside or hidden or link)


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
