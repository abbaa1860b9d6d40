"""A data set in a .zip, unpacked once into the user's cache folder."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

from ..files import sha256

MAX_UNZIPPED = 40e9  # bytes that a zip may hold
UNFINISHED = ".unpacking-"  # how folders are called that are being unpacked, or removed
ABANDONED = 3600.0  # seconds without a new file after which such a folder is left over from a killed run
DEEPEST = 100  # folders inside each other; Python can't list a thousand
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}  # not the zip's fault


@contextlib.contextmanager
def unpacked(archive: Path) -> Iterator[Path]:
    """The folder of `unzip`. It is removed again if the block raises ValueError: what is in it is refused.

    The error then names the zip instead of the folder. Raises what `unzip` raises.
    """
    target = _unzip(archive)
    folder = _inside(target)
    try:
        yield folder
    except ValueError as error:
        _remove(target)
        raise ValueError(str(error).replace(str(folder), str(archive))) from None


def unzip(archive: Path) -> Path:
    """The folder with a zip's content, unpacked once into the user's cache folder, under its SHA-256.

    Skips links, hidden files and names that lead out of the folder; enters a single folder at the top. Raises
    FileNotFoundError, ValueError for a zip that is damaged, encrypted or far too large, OSError for a full disk.
    """
    return _inside(_unzip(archive))


def _inside(target: Path) -> Path:
    inside = list(target.iterdir())
    return inside[0] if len(inside) == 1 and inside[0].is_dir() else target


def _unzip(archive: Path) -> Path:
    if not archive.is_file():
        raise FileNotFoundError(f"the file '{archive}' does not exist; check the path")
    target = _target(archive)
    try:
        _tidy(target.parent)
        there = target.is_dir()
    except OSError as error:  # somebody else's home folder
        raise _no_place(archive, target.parent, error) from None
    if not there:
        temporary = _make_folder(archive, target.parent)
        try:
            _extract(archive, temporary)
            _rename(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return target


def _target(archive: Path) -> Path:
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "naruto_lora"
    except RuntimeError:  # the user has no home folder
        raise OSError(f"there is no home folder to unpack '{archive}' into; set XDG_CACHE_HOME to a folder") from None
    return root / sha256(archive)[:16]


def _tidy(root: Path) -> None:
    """Removes what killed runs left half unpacked."""
    for folder in root.glob(f"{UNFINISHED}*"):
        with contextlib.suppress(FileNotFoundError):  # another process may have finished it
            if time.time() - folder.stat().st_mtime > ABANDONED:
                shutil.rmtree(folder, ignore_errors=True)


def _make_folder(archive: Path, root: Path) -> Path:
    try:
        root.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(dir=root, prefix=UNFINISHED))
    except OSError as error:
        raise _no_place(archive, root, error) from None


def _no_place(archive: Path, root: Path, error: OSError) -> OSError:
    return OSError(
        f"the zip '{archive}' can't be unpacked into '{root}' ({error.strerror}); "
        "make room there, or set XDG_CACHE_HOME to another folder"
    )


def _rename(temporary: Path, target: Path) -> None:
    try:
        temporary.replace(target)
    except OSError:
        if not target.is_dir():  # another process was not faster
            raise


def _remove(folder: Path) -> None:
    """Removes an unpacked folder; a process that looks at the same time finds it whole or not at all."""
    with contextlib.suppress(OSError):  # a full disk, or another process was faster
        gone = tempfile.mkdtemp(dir=folder.parent, prefix=UNFINISHED)
        folder.replace(gone)
        shutil.rmtree(gone, ignore_errors=True)


def _extract(archive: Path, folder: Path) -> None:
    with _named(archive, folder):
        opened = zipfile.ZipFile(archive)
    with opened:
        entries = [entry for entry in opened.infolist() if _plain_file(entry)]
        size, free = sum(entry.file_size for entry in entries), shutil.disk_usage(folder).free
        if size > min(MAX_UNZIPPED, free - 2**30):
            raise ValueError(
                f"the zip '{archive}' holds {size / 1e9:.1f} GB, more than {MAX_UNZIPPED / 1e9:.0f} GB or too much "
                f"for the disk's {free / 1e9:.1f} GB; use a smaller one"
            )
        for entry in entries:
            with _named(archive, folder, entry.filename):
                if entry.filename.count("/") > DEEPEST:
                    raise ValueError(f"More than {DEEPEST} folders deep")
                opened.extract(entry, folder)
                os.utime(folder)  # not abandoned


@contextlib.contextmanager
def _named(archive: Path, folder: Path, entry: str = "") -> Iterator[None]:
    """Turns an error of the block into one that names the zip: OSError for the disk's fault, else ValueError."""
    try:
        yield
    except Exception as error:  # a damaged zip raises many kinds, by its compression
        if isinstance(error, OSError) and error.errno in DISK:
            raise _no_place(archive, folder.parent, error) from None
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        at = f"{entry[:40]!r}: " if entry and entry not in reason else ""
        raise ValueError(
            f"the zip '{archive}' can't be unpacked ({at}{reason:.80}); zip it again with short names and no password"
        ) from None


def _plain_file(entry: zipfile.ZipInfo) -> bool:
    """Whether a zip's entry is a visible file inside the folder that the zip is unpacked into."""
    parts = entry.filename.replace("\\", "/").split("/")
    outside = entry.filename.startswith(("/", "\\")) or any(part == ".." or ":" in part for part in parts)
    hidden = any(part.startswith(".") for part in parts) or parts[0] == "__MACOSX"
    link = entry.external_attr >> 28 == 0xA  # the file type in Unix' mode bits
    return not (entry.is_dir() or outside or hidden or link)
