"""File names as different systems write them: compared, shortened, put right."""

from __future__ import annotations

import hashlib
import posixpath
import re
import unicodedata
from collections.abc import Iterator

LONGEST = 255  # bytes that a disk takes for one name
ENCODINGS = ("utf-8", "cp932", "gbk", "big5", "cp949")  # of names in zips that don't say theirs
ENDINGS = re.compile(r"(\.\w{1,8}){0,2}$", re.ASCII)  # '.png', or '.png.txt'


def plain(name: str) -> str:
    """A name in the form that names are compared in: no blank ends, '/' between folders, no './', letters as NFC."""
    name = unicodedata.normalize("NFC", name.strip().replace("\\", "/"))
    return posixpath.normpath(name).removeprefix("./") if name else name


def others(name: str) -> Iterator[str]:
    """The names that a file may have got on its way through a zip, in the form of `plain`, likeliest first.

    A zip that doesn't say how its names are written is read as cp437, so that '猫' in GBK becomes '├¿'.
    """
    name = plain(name)
    yield from (plain(fitting(name)), plain(fitting(name, last=True)))
    for encoding in ENCODINGS:
        for form in ("NFC", "NFD"):
            try:
                read = unicodedata.normalize(form, name).encode(encoding).decode("cp437")
            except UnicodeError:
                continue
            yield from (plain(read), plain(fitting(read)), plain(fitting(read, last=True)))


def fitting(name: str, last: bool = False) -> str:
    """The name with each part of more than LONGEST bytes shortened, and with `last` the last part in any case.

    A shortened part ends in eight digits of its SHA-256 and its own ending, so that two long names stay two, and files
    of one name and several endings stay together.
    """
    *parts, end = name.split("/")
    long = [*(_bytes(part) > LONGEST for part in parts), last or _bytes(end) > LONGEST]
    return "/".join(_shortened(part) if cut else part for part, cut in zip([*parts, end], long, strict=True))


def stem(name: str) -> str:
    """A file's name without '.png' or '.png.txt'."""
    return name[: ENDINGS.search(name).start()]  # type: ignore[union-attr]  # it matches an empty end as well


def _shortened(part: str) -> str:
    first = stem(part)
    digits = hashlib.sha256(unicodedata.normalize("NFC", first).encode(errors="replace")).hexdigest()[:8]
    return first.encode(errors="replace")[:200].decode(errors="ignore") + f"~{digits}" + part[len(first) :]


def _bytes(part: str) -> int:
    return len(part.encode(errors="replace"))
