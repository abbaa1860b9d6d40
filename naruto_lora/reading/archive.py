"""A data set in a .zip or .tar, unpacked once into the user's cache folder."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

from ..files import sha256
from . import entries
from .report import Found

TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
FORMAT = "2"  # of unpacked folders; another one when other files or names are unpacked
MAX_UNZIPPED = 40e9  # bytes that a zip may hold
UNFINISHED = ".unpacking-"  # how folders are called that are being unpacked, or removed
ABANDONED = 3600.0  # seconds without a new file after which such a folder is left over from a killed run
DEEPEST = 100  # folders inside each other; Python can't list a thousand
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}  # not the zip's fault


def is_read(file: Path) -> bool:
    """Whether a file's ending is that of an archive that `unpacked` reads."""
    return file.name.lower().endswith((".zip", *TARS))


@contextlib.contextmanager
def unpacked(archive: Path, found: Found) -> Iterator[Path]:
    """The folder of `unzip`. It is removed again if the block raises ValueError: what is in it is refused.

    The error then names the zip instead of the folder. Raises what `unzip` raises.
    """
    target = _unzip(archive, found)
    folder = _inside(target)
    try:
        yield folder
    except ValueError as error:
        _remove(target)
        raise ValueError(str(error).replace(str(folder), str(archive))) from None


def unzip(archive: Path, found: Found | None = None) -> Path:
    """The folder with an archive's content, unpacked once into the user's cache folder, under its SHA-256.

    Skips links, hidden files and names that lead out of the folder; enters a single folder at the top. `found` gets
    what is skipped. Raises FileNotFoundError, ValueError for an archive that is damaged, encrypted or far too large,
    OSError for a full disk.
    """
    return _inside(_unzip(archive, found or Found()))


def _inside(target: Path) -> Path:
    inside = list(target.iterdir())
    return inside[0] if len(inside) == 1 and inside[0].is_dir() else target


def _unzip(archive: Path, found: Found) -> Path:
    if not archive.is_file():
        raise FileNotFoundError(f"the file '{archive}' does not exist; check the path")
    target = _target(archive)
    try:
        _tidy(target.parent)
        there = target.is_dir()
    except OSError as error:  # somebody else's home folder
        raise _no_place(archive, target.parent, error) from None
    with _named(archive, target.parent):
        opened = _open(archive)
    with opened:
        with _named(archive, target.parent):
            plan = _zip_plan(opened, found) if isinstance(opened, zipfile.ZipFile) else _tar_plan(opened, found)
        if not there:
            temporary = _make_folder(archive, target.parent)
            try:
                _extract(archive, opened, plan, temporary)
                _rename(temporary, target)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
            _remove(target.with_suffix(""))  # as an older version unpacked it
    return target


def _open(archive: Path) -> zipfile.ZipFile | tarfile.TarFile:
    return zipfile.ZipFile(archive) if _is_zip(archive) else tarfile.open(archive)


def _is_zip(archive: Path) -> bool:
    return archive.suffix.lower() == ".zip"


def _target(archive: Path) -> Path:
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "naruto_lora"
    except RuntimeError:  # the user has no home folder
        raise OSError(f"there is no home folder to unpack '{archive}' into; set XDG_CACHE_HOME to a folder") from None
    return root / f"{sha256(archive)[:16]}.{FORMAT}"


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
        f"the {_kind(archive)} '{archive}' can't be unpacked into '{root}' ({error.strerror}); "
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
    if not folder.is_dir():
        return
    with contextlib.suppress(OSError):  # a full disk, or another process was faster
        gone = tempfile.mkdtemp(dir=folder.parent, prefix=UNFINISHED)
        folder.replace(gone)
        shutil.rmtree(gone, ignore_errors=True)


Entry = zipfile.ZipInfo | tarfile.TarInfo
Plan = list[tuple[str, int, Entry]]  # of each file: its name in the archive, its bytes, and its entry with the new name


def _zip_plan(opened: zipfile.ZipFile, found: Found) -> Plan:
    files = [entry for entry in opened.infolist() if not entry.is_dir()]
    for entry in files:
        if _is_link(entry):
            found.leave("links in the archive", entry.filename)
    files = [entry for entry in files if not _is_link(entry)]
    utf8 = all(entry.flag_bits & 0x800 or entry.filename.isascii() for entry in files)
    targets = entries.wanted([entry.filename for entry in files], found, utf8)
    plan: Plan = []
    for entry in files:
        if name := targets.get(entry.filename):
            plan.append((entry.filename, entry.file_size, entry))
            entry.filename = name
    return plan


def _is_link(entry: zipfile.ZipInfo) -> bool:
    return entry.external_attr >> 28 == 0xA  # the file type in Unix' mode bits


def _tar_plan(opened: tarfile.TarFile, found: Found) -> Plan:
    files, size = [], 0
    for member in opened:
        if member.isreg():
            files.append(member)
            size += member.size
            if size > MAX_UNZIPPED:  # before all of it is decompressed to find the next one
                break
        elif not member.isdir():
            found.leave("links in the archive", member.name)
    targets = entries.wanted([member.name for member in files], found)
    return [(member.name, member.size, member.replace(name=targets[member.name], deep=False))
            for member in files if member.name in targets]  # fmt: skip


def _extract(archive: Path, opened: zipfile.ZipFile | tarfile.TarFile, plan: Plan, folder: Path) -> None:
    size, free = sum(size for _, size, _ in plan), shutil.disk_usage(folder).free
    if size > min(MAX_UNZIPPED, free - 2**30):
        raise ValueError(
            f"the {_kind(archive)} '{archive}' holds {size / 1e9:.1f} GB, more than {MAX_UNZIPPED / 1e9:.0f} GB or too "
            f"much for the disk's {free / 1e9:.1f} GB; use a smaller one"
        )
    for name, _, entry in plan:
        with _named(archive, folder, name):
            if name.count("/") > DEEPEST:
                raise ValueError(f"More than {DEEPEST} folders deep")
            if isinstance(opened, zipfile.ZipFile):
                opened.extract(entry, folder)  # type: ignore[arg-type]  # a ZipFile's plan has its entries
            else:
                opened.extract(entry, folder, filter="data")  # type: ignore[arg-type]
            os.utime(folder)  # not abandoned


def _kind(archive: Path) -> str:
    return "zip" if _is_zip(archive) else "archive"


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
            f"the {_kind(archive)} '{archive}' can't be unpacked ({at}{reason:.80}); "
            "zip it again with short names and no password"
        ) from None
