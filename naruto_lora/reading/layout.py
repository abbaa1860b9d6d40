"""From what stands in `dataset` to rows: which reader reads it, or what is wrong with it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from .. import hub
from . import archive, folder, table, tree
from .report import Found

DRIVE = Path("/content/drive")  # where Colab mounts Google Drive
OTHERS = (".rar", ".7z", ".gz", ".bz2", ".xz", ".zst")  # archives that aren't read


def clean(dataset: str | Path) -> str | Path:
    """`dataset` without what comes along when it is pasted: blanks, line breaks and quotes around it."""
    if not isinstance(dataset, str) or not dataset.strip() or os.path.exists(os.path.expanduser(dataset)):
        return dataset
    text = dataset.strip()
    while len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        text = text[1:-1].strip()
    return " ".join(text.splitlines())


@contextlib.contextmanager
def opened(dataset: str | Path, found: Found) -> Iterator[list[folder.Row]]:
    """The rows of a folder, an archive of one, a .parquet file or a hub data set; `found` gets what was left out.

    An archive is unpacked once; it is removed again if the block raises ValueError. Raises FileNotFoundError for what
    is not there, ValueError for what is wrong inside or is no data set, OSError for a full disk.
    """
    dataset = clean(dataset)
    if not str(dataset).strip():
        raise FileNotFoundError("`dataset` is empty; set it to a folder, a .zip or a hub id")
    place = Path(os.path.expanduser(dataset))
    if os.path.isdir(place):
        yield _filled(dataset, _of_folder(place, found), found)
    elif archive.is_read(place) and not _on_drive(place):
        with archive.unpacked(place, found) as unpacked:
            yield _filled(dataset, _of_folder(unpacked, found), found)
    elif os.path.isfile(place) and place.suffix.lower() == ".parquet":
        yield _filled(dataset, table.read(str(place), found), found)
    elif os.path.exists(place):
        raise ValueError(f"'{dataset}' {_no_data_set(place)}")
    elif _on_drive(place):
        raise FileNotFoundError(f"'{dataset}' is on Google Drive, which is not mounted; switch `drive` on, or check "
                                f"that the path begins with '{DRIVE}/MyDrive'")  # fmt: skip
    elif isinstance(dataset, str) and hub.is_id(dataset):
        yield _filled(dataset, table.read(dataset, found), found)
    else:
        name = str(dataset).encode(errors="replace").decode()[:200]
        raise FileNotFoundError(f"the data set folder '{name}' does not exist; check the path, or use a hub id")


def _of_folder(place: Path, found: Found) -> list[folder.Row]:
    walked = Found()
    files = tree.files(place, walked)
    tables = [file for file in files if file.suffix.lower() == ".parquet"]
    pictures = [file for file in files if folder.is_picture(file)]
    if not tables or (pictures and not all(table.has_columns(file) for file in tables)):
        found.add(walked)
        return folder.read(place, found, files)
    rows = table.read(str(place), found)
    used = {row.source for row in rows}
    for file in pictures:
        if not used & {file, file.resolve()}:
            found.leave("no row of the parquet files names it", file.relative_to(place).as_posix())
    return rows


def _filled(dataset: str | Path, rows: list[folder.Row], found: Found) -> list[folder.Row]:
    if not rows:
        inner = "".join(f"; unpack {name!r}, which is inside" for name in found.left.get(folder.PACKED, [])[:1])
        kinds = ", ".join(folder.SUFFIXES[:8])
        raise ValueError(f"the data set '{dataset}' has no pictures; it needs {kinds} ... files with captions{inner}")
    return rows


def _on_drive(place: Path) -> bool:
    """Whether a path that isn't there looks like one on a Google Drive that isn't mounted."""
    on_drive = place.is_relative_to(DRIVE) or place.parts[:1] == ("MyDrive",) or place.parts[:2] == ("drive", "MyDrive")
    return on_drive and not os.path.exists(place) and not (place.is_relative_to(DRIVE) and (DRIVE / "MyDrive").is_dir())


def _no_data_set(place: Path) -> str:
    """What is wrong with a file that is no data set, and the mend."""
    suffix = place.suffix.lower()
    if suffix in OTHERS:
        return f"is a {suffix} archive, which isn't read; unpack it and set `dataset` to its folder, or zip that"
    if folder.is_picture(place) or suffix in folder.TEXTS:
        kind = "picture" if folder.is_picture(place) else "text"
        return f"is a single {kind}; set `dataset` to the folder that holds pictures and their captions"
    return "is no data set; set `dataset` to a folder, a .zip, .tar or .parquet file, or a hub id"
