"""Which files of an archive are unpacked, and under which names."""

from __future__ import annotations

import re

from . import names
from .report import Found

DRIVE = re.compile(r"[A-Za-z]:/")
SEPARATOR = re.compile(r"(?<![^\0-\x7f])\\")  # not the second byte of a Japanese letter that was read as cp437
JUNK = "__MACOSX"


def wanted(given: list[str], found: Found, utf8: bool = True) -> dict[str, str]:
    """{an entry's name: its name on disk} without hidden files and names that lead out of the folder.

    Backslashes are read as folders (all if the names are `utf8`), names of more than 255 bytes are shortened with all
    files that have the same name but another ending. Hidden files are shown if all are in one hidden folder.
    """
    inside: dict[str, list[str]] = {}
    for name in given:
        path = name.replace("\\", "/") if utf8 else SEPARATOR.sub("/", name)
        parts = [part for part in path.split("/") if part not in ("", ".")]
        if path.startswith("/") or DRIVE.match(path) or ".." in parts:
            found.leave("names that lead out of the folder", name)
        elif parts and parts[0] != JUNK:
            inside[name] = parts
    tops = {parts[0] if len(parts) > 1 else "" for parts in inside.values()}
    first = 1 if len(tops) == 1 and "" not in tops else 0  # all are in one folder, which may be hidden
    shown = {name: parts for name, parts in inside.items() if not any(p.startswith(".") for p in parts[first:])}
    return _fitting(shown, found)


def _fitting(shown: dict[str, list[str]], found: Found) -> dict[str, str]:
    paths = {name: "/".join(parts) for name, parts in shown.items()}
    long = {names.stem(path) for path in paths.values() if names.fitting(path) != path}
    if long:
        found.say(f"{len(long):,} names of more than {names.LONGEST} bytes are shortened on this disk")
    return {name: names.fitting(path, names.stem(path) in long) for name, path in paths.items()}
