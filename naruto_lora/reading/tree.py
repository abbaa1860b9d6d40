"""The files of a folder and of the folders inside it, in order: hidden ones left out, links followed once."""

from __future__ import annotations

import os
from pathlib import Path

from .report import Found

JUNK = {"thumbs.db", "desktop.ini", "ehthumbs.db"}  # what Windows leaves in folders


def files(folder: Path, found: Found) -> list[Path]:
    """The visible files in `folder`, sorted. A link to a folder is followed unless its files are here already."""
    seen: set[str] = set()
    inside, links = _walk(folder, seen)
    while links:
        link = links.pop(0)
        real, name = os.path.realpath(link), link.relative_to(folder).as_posix()
        if Path(os.path.realpath(folder)).is_relative_to(real) and real not in seen:
            found.leave("links to a folder around the data set", name)
        elif real not in seen:
            more, further = _walk(link, seen)
            inside, links = inside + more, links + further
    return sorted(inside)


def _walk(folder: Path, seen: set[str]) -> tuple[list[Path], list[Path]]:
    """(files, links to folders) below `folder`; enters no folder whose real path is in `seen`, and adds to it."""
    inside, links = [], []
    for place, folders, names in os.walk(folder):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        here = Path(place)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__MACOSX")
        links += [here / name for name in folders if (here / name).is_symlink()]
        folders[:] = [name for name in folders if not (here / name).is_symlink()]
        shown = [name for name in names if not name.startswith(".") and name.lower() not in JUNK]
        inside += [here / name for name in shown if (here / name).is_file()]
    return inside, links
