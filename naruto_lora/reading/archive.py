"""A data set in a .zip, unpacked once into the user's cache folder."""

from __future__ import annotations

import os
import shutil
import tempfile
import zipfile
import zlib
from pathlib import Path

from ..files import sha256

MAX_UNZIPPED = 40e9  # bytes that a zip may hold


def unzip(archive: Path) -> Path:
    """The folder with a zip's content, unpacked once into the user's cache folder, under its SHA-256.

    Skips links, hidden files and names that lead out of the folder; enters a single folder at the top. Raises
    FileNotFoundError, ValueError for a zip that is damaged, encrypted or far too large, OSError for a full disk.
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
            entries = [entry for entry in opened.infolist() if _plain_file(entry)]
            size, free = sum(entry.file_size for entry in entries), shutil.disk_usage(folder).free
            if size > min(MAX_UNZIPPED, free - 2**30):
                raise ValueError(
                    f"the zip '{archive}' holds {size / 1e9:.1f} GB, more than {MAX_UNZIPPED / 1e9:.0f} GB or too much "
                    f"for the disk's {free / 1e9:.1f} GB; use a smaller one"
                )
            for entry in entries:
                opened.extract(entry, folder)
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, zlib.error, EOFError) as error:
        raise ValueError(f"the zip '{archive}' can't be unpacked ({error}); zip it again, without a password") from None


def _plain_file(entry: zipfile.ZipInfo) -> bool:
    """Whether a zip's entry is a visible file inside the folder that the zip is unpacked into."""
    parts = entry.filename.replace("\\", "/").split("/")
    outside = entry.filename.startswith(("/", "\\")) or any(part == ".." or ":" in part for part in parts)
    hidden = any(part.startswith(".") for part in parts) or parts[0] == "__MACOSX"
    link = entry.external_attr >> 28 == 0xA  # the file type in Unix' mode bits
    return not (entry.is_dir() or outside or hidden or link)
