"""The encoded cache on disk: shards, safetensors files of many entries with a checksum, and their mirror.

An entry is {name: tensor}; in the file its tensors are called <key>.<name>. The file's metadata has the SHA-256 of all
its tensors; files of earlier versions have none.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save

from .. import files
from ..progress import note

FULL_BYTES, FULL_ENTRIES = 16 * 2**20, 64  # either fills a shard: some 50 captions, or 64 pictures at 1024 px
ABANDONED = 3600.0  # seconds after which an unfinished file counts as left by a killed run
SETTLED = 2.0  # seconds after a change until another one is sure to give a file a new time
SUM = "sha256"  # the checksum's name in a shard's metadata

Entry = dict[str, torch.Tensor]
Fits = Callable[[Entry], bool]  # whether an entry has the right tensors, shapes and dtypes
_checked: set[tuple] = set()  # the files that this process has read and found whole


class Shards:
    """The shards in `folder`, and their copies in `mirror`. Every entry that is read from them `fits`."""

    def __init__(self, folder: Path, fits: Fits, mirror: Mirror | None = None, show=None):
        self.folder, self.fits, self.mirror, self.show = folder, fits, mirror or Mirror(None, show), show

    def find(self, keys: Iterable[str]) -> dict[str, safe_open]:
        """{key: its memory-mapped shard} for those of `keys` that are here or in the mirror; creates the folder.

        A shard with one of `keys` is read and checked, once a process. A spoilt one is reported and removed, here and
        in the mirror, and replaced by a whole copy of it. Raises OSError if the folder can't be used.
        """
        keys = set(keys)
        with self._usable():
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_abandoned(self.folder)
            here = self._whole(self.folder, keys)
        self.mirror.exchange(self.folder, here, keys, self._whole)
        found: dict[str, safe_open] = {}
        for path in sorted(here):
            with self._usable(), suppress(FileNotFoundError, SafetensorError):  # another run has just removed it
                found |= dict.fromkeys(keys & here[path], safe_open(path, "pt"))
        return found

    def write(self, entries: dict[str, Entry], left: int) -> dict[str, safe_open]:
        """Writes one shard, here and in the mirror; returns it memory-mapped, by key.

        `left` entries are still to be written. Raises OSError, which says how much room they need.
        """
        tensors = {f"{key}.{name}": value for key, entry in entries.items() for name, value in entry.items()}
        content = save(tensors, {SUM: checksum(tensors)})
        path = self.folder / f"{key_of('shard', '|'.join(sorted(entries)).encode())}.safetensors"
        try:
            opened = _written(path, content)
        except OSError as error:
            need = math.ceil(len(content) * (1 + left / len(entries)) / 2**20)
            raise OSError(
                f"the cache folder '{self.folder}' can't be written ({error.strerror or error}): it needs {need} MiB "
                f"or more; make room or choose another folder. Finished entries are kept"
            ) from None
        self.mirror.put(path)
        return dict.fromkeys(entries, opened)

    @contextmanager
    def _usable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            raise OSError(f"the cache folder '{self.folder}' can't be used ({reason}): choose another") from None

    def _whole(self, folder: Path, keys: set[str]) -> dict[Path, set[str]]:
        """{path: its keys} of the shards in `folder` with some of `keys`; reports and removes spoilt ones."""
        found = {}
        for path in sorted(folder.glob("*.safetensors")):
            with suppress(FileNotFoundError):  # another run has just removed it
                if not path.is_file():
                    self._put_aside(path)
                    continue
                held, reason = self._read(path, keys)
                if reason:
                    note(self.show, f"'{path}' in the cache is broken ({reason}): it is removed and made again")
                    path.unlink(missing_ok=True)
                elif keys & held:
                    found[path] = held
        return found

    def _read(self, path: Path, keys: set[str]) -> tuple[set[str], str | None]:
        """(the keys in a shard, what is wrong with it or None). Only a shard with some of `keys` is read to its end."""
        with open(path, "rb") as file:  # not memory-mapped: a fault of the disk is an exception, and kills nothing
            try:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length if length < 2**27 else 0))  # safetensors' own limit is 10**8
                stored = header.pop("__metadata__", None)
                held = {name.rpartition(".")[0] for name in header}
            except (ValueError, TypeError, AttributeError, RecursionError):
                return set(), "its header can't be read"
            status = os.fstat(file.fileno())
            state = (str(path), status.st_ino, status.st_size, status.st_mtime_ns)
            if not keys & held or state in _checked:
                return held, None
            file.seek(0)
            reason = self._problem(file.read(), stored)
        if reason is None and time.time() - status.st_mtime > SETTLED:
            _checked.add(state)
        return held, reason

    def _problem(self, content: bytes, stored: dict | None) -> str | None:
        """Why a shard can't be used, from its bytes and its metadata."""
        try:
            tensors = load(content)
        except (SafetensorError, KeyError) as error:  # KeyError: a dtype that torch doesn't have
            return str(error)
        if stored is not None and stored.get(SUM) != checksum(tensors):
            return "its checksum is wrong"
        entries: dict[str, Entry] = {}
        for name, value in tensors.items():
            key, _, part = name.rpartition(".")
            entries.setdefault(key, {})[part] = value
        if not all(map(self.fits, entries.values())):
            return "an entry lacks a tensor, or has another shape"
        if stored is None and not all(value.isfinite().all() for value in tensors.values()):
            return "an entry is not finite"
        return None

    def _put_aside(self, path: Path) -> None:
        """Renames a folder or a device that has a shard's name."""
        if path.exists():
            note(self.show, f"'{path}' in the cache is not a file: it is renamed to '{path.name}.aside'")
            with suppress(OSError):
                path.rename(path.with_name(f"{path.name}.aside"))


class Mirror:
    """A second folder of shards. It reports its first error; then the run continues without it."""

    def __init__(self, folder: str | Path | None, show=None):
        self.folder, self.show = Path(folder) if folder else None, show

    def exchange(self, folder: Path, ours: dict[Path, set[str]], keys: set[str], whole: Callable) -> None:
        """Copies shards with entries of `keys` between `folder` and the mirror, if only one of the two has them.

        `ours` are the whole shards in `folder` {path: keys}, to which the copies are added; `whole(folder, keys)`
        gives those of a folder.
        """
        self._attempt(self._exchange, folder, ours, keys, whole)

    def put(self, path: Path) -> None:
        """Copies one shard into the mirror."""
        self._attempt(lambda mirror: _copied(path, mirror / path.parent.name / path.name))

    def _exchange(self, mirror: Path, folder: Path, ours: dict, keys: set[str], whole: Callable) -> None:
        mirrored = mirror / folder.name
        for place in (mirror, mirrored):
            place.mkdir(exist_ok=True)
        theirs = whole(mirrored, keys)
        for source, target, known in ((theirs, folder, ours), (ours, mirrored, theirs)):
            lacking = keys.difference(*known.values())
            for path, held in source.items():
                if lacking & held and _copied(path, target / path.name):
                    known[target / path.name] = held
                    lacking -= held

    def _attempt(self, action, *arguments) -> None:
        if self.folder is None:
            return
        try:
            action(self.folder, *arguments)
        except OSError as error:
            reason = error.strerror or error
            note(self.show, f"no copy of the cache is kept in '{self.folder}' ({reason}); the run continues")
            self.folder = None


def _written(path: Path, content: bytes, tries: int = 3) -> safe_open:
    """Writes a shard; returns it memory-mapped. Another run may take it for the spoilt one of before, and remove it."""
    files.replace(path, lambda temporary: temporary.write_bytes(content))
    try:
        return safe_open(path, "pt")
    except FileNotFoundError:
        if tries == 1:
            raise
    return _written(path, content, tries - 1)


def _copied(source: Path, target: Path, tries: int = 3) -> bool:
    """Copies a shard; False if another run has just removed it."""
    try:
        files.copy_whole(source, target)
        return True
    except OSError as error:
        if error.errno == errno.ENOENT and not source.exists():
            return False
        if error.errno != errno.ENOENT or tries == 1:  # the target's folder is gone
            raise
    return _copied(source, target, tries - 1)  # it was removed and written again


def key_of(kind: str, content: bytes) -> str:
    """A name for `content`: 32 hex digits of its SHA-256."""
    return hashlib.sha256(kind.encode() + b"\0" + content).hexdigest()[:32]


def checksum(tensors: Entry) -> str:
    """The SHA-256 of tensors with their names, dtypes and shapes, whatever their order."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def is_full(entries: dict[str, Entry]) -> bool:
    """Whether `entries` fill a shard."""
    size = sum(value.nbytes for entry in entries.values() for value in entry.values())
    return len(entries) >= FULL_ENTRIES or size >= FULL_BYTES


def remove_abandoned(folder: Path) -> None:
    """Removes what killed runs left half written; other runs may be writing and renaming there at the same time."""
    for path in folder.glob("*.writing"):
        with suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > ABANDONED:
                path.unlink()
