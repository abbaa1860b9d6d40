"""One owner a run: a claim on a folder that other processes, and other machines on one Drive, respect.

The claim is the file `.owner`, with a heartbeat for other machines, and a lock by the kernel for this one, which ends
with its process. So a dead owner on this machine is replaced at once; one on another machine, once it is silent.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import platform
import secrets
import threading
import time
import uuid
import weakref
from pathlib import Path

from ..progress import note

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]  # Windows: the heartbeat alone

NAME = ".owner"
BEAT = 30.0  # seconds between two signs of life
SILENT = 120.0  # seconds without one, as seen here, after which an owner counts as dead: Drive syncs late
LONG_AGO = 600.0  # seconds since the last sign, by the clocks of two machines, after which nobody waits
_held: weakref.WeakValueDictionary[str, Claim] = weakref.WeakValueDictionary()  # this process's, by real path


class Taken(RuntimeError):
    """Somebody else is the owner; the message says who."""


class Claim:
    """This process's claim on `folder`: from `hold` to `release`, or to the end of the process."""

    def __init__(self, folder: Path, show=None):
        self.folder, self.show, self.thread = Path(folder), show, threading.current_thread()
        self.id, self.since, self.beats = secrets.token_hex(8), time.time(), 0
        self._end: weakref.finalize | None = None

    @property
    def held(self) -> bool:
        return self._end is not None and self._end.alive

    def hold(self, wait: bool = False) -> None:
        """Makes the folder this claim's, or checks that it still is. Raises OSError if that can't be written.

        Raises Taken if another thread, process or machine has it, also since, as after this machine slept. With `wait`
        it watches another machine's claim for a sign of life, SILENT seconds at most, and says so through `show`. The
        claim that the same thread held before is replaced.
        """
        if not self.held:
            self._acquire(wait)
        elif (other := read(self.folder)) and other["id"] not in ("", self.id):
            raise Taken(_sentence(self.folder, other))

    def _acquire(self, wait: bool) -> None:
        place = str(self.folder.resolve())
        before = _held.get(place)
        if before and before.held:
            if self._end or (before.thread is not self.thread and before.thread.is_alive()):
                raise Taken(_sentence(self.folder, read(self.folder)))
            before.release()
        lock, stop = _lock(self.folder), threading.Event()
        with contextlib.ExitStack() as undo:
            undo.callback(_close, lock)
            other = read(self.folder)
            if other and (lock is None or other["machine"] != machine()):  # its lock would be there if it lived here
                _refuse_living(self.folder, other, self.show, wait)
            self.beat()
            undo.pop_all()
        self._end = weakref.finalize(self, _release, self.folder.resolve(), self.id, lock, stop)
        _held[place] = self
        threading.Thread(target=_beat, args=(weakref.ref(self), stop), daemon=True, name="owner").start()

    def beat(self) -> None:
        """A sign of life. Raises OSError."""
        content = {
            "machine": machine(), "host": platform.node(), "pid": os.getpid(), "id": self.id,
            "since": self.since, "at": time.time(), "beats": self.beats,
        }  # fmt: skip
        (self.folder / NAME).write_text(json.dumps(content), encoding="utf-8")
        self.beats += 1

    def release(self) -> None:
        """Gives the folder back; without effect if it isn't held."""
        if self._end:
            self._end()


def _lock(folder: Path) -> int | None:
    """The kernel's lock on the folder itself; None on Windows and on network disks without locks.

    Raises Taken if another process of this machine has it.
    """
    if fcntl is None:
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise Taken(_sentence(folder, read(folder))) from None
        return None
    return handle


def read(folder: Path) -> dict | None:
    """The claim on `folder`; None if there is none. One that can't be read, as while it is written, has no id."""
    unknown = {"machine": "", "host": "?", "pid": 0, "id": "", "since": 0.0, "at": 0.0, "beats": -1}
    try:
        found = json.loads((folder / NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        return unknown
    fits = isinstance(found, dict) and all(type(found.get(key)) is type(value) for key, value in unknown.items())
    return found if fits else unknown


@functools.cache
def machine() -> str:
    """What tells this machine, or container, from every other one, and from itself before it was started anew."""
    parts = [platform.node(), str(uuid.getnode())]
    with contextlib.suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text(), str(Path("/proc/self/ns/pid").readlink())]
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:16]


def _refuse_living(folder: Path, other: dict, show, wait: bool) -> None:
    """Raises Taken unless the owner `other` is dead, as far as can be seen from here."""
    silent_for = time.time() - other["at"] if other["id"] else 0.0
    if silent_for > LONG_AGO or (other["machine"] == machine() and _ended(other["pid"])):
        return
    if not wait:
        raise Taken(_sentence(folder, other))
    note(show, f"{_sentence(folder, other, mend=False)}; waiting up to {SILENT:.0f} seconds for a sign of life")
    deadline = time.monotonic() + SILENT
    while time.monotonic() < deadline:
        time.sleep(min(1.0, SILENT / 10))
        now = read(folder)
        if now is None:  # it has finished
            return
        if (now["id"], now["beats"]) != (other["id"], other["beats"]):
            raise Taken(_sentence(folder, now))


def _ended(pid: int) -> bool:
    """Whether a process of this machine has ended. On Windows it can't be asked without harm."""
    if os.name != "posix" or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _sentence(folder: Path, owner: dict | None, mend: bool = True) -> str:
    who = "another process"
    if owner and owner["id"]:
        here = owner["machine"] == machine()
        who = f"process {owner['pid']} on this machine" if here else f"another machine, '{owner['host']}'"
        who += f" (since {time.strftime('%H:%M', time.localtime(owner['since']))})"
    text = f"'{folder}' is in use by a run of {who}"
    return f"{text}: wait for it, stop it there, or choose another folder" if mend else text


def _beat(claim: weakref.ref, stop: threading.Event) -> None:
    """Gives signs of life until `stop` is set, the claim is gone, or somebody else has the folder."""
    while not stop.wait(BEAT):
        held = claim()
        if held is None:
            return
        with contextlib.suppress(OSError):  # a disk that has gone: the next beat tries again
            try:
                held.hold()
            except Taken:
                return
            held.beat()
        del held


def _release(folder: Path, identity: str, lock: int | None, stop: threading.Event) -> None:
    stop.set()
    with contextlib.suppress(OSError):
        if (read(folder) or {}).get("id") == identity:
            (folder / NAME).unlink()
    _close(lock)


def _close(lock: int | None) -> None:
    if lock is not None:
        with contextlib.suppress(OSError):
            os.close(lock)
