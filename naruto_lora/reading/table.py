"""Captioned pictures in a table, read by the `datasets` library: parquet files, or a data set on the hub."""

from __future__ import annotations

import os
import reprlib
import textwrap
from pathlib import Path

from .. import hub
from .folder import Row
from .metadata import COLUMNS
from .report import Found


def read(dataset: str, found: Found) -> list[Row]:
    """(name, caption, file or bytes) of each row of a .parquet file, a folder with some, or a hub data set.

    Raises FileNotFoundError if it can't be downloaded, ValueError if it can't be read, lacks the columns image and
    text, or names a picture that is not inside its folder.
    """
    import datasets

    local = Path(dataset).exists()
    try:
        place = dataset if local else str(hub.data_set(dataset))
        rows = _split(dataset, place, found)
    except _NoSplitError:
        raise
    except Exception as error:  # the hub's client raises many kinds; a user needs one sentence
        if isinstance(error, (FileNotFoundError, TimeoutError)) and dataset in str(error):
            raise
        if local and (damaged := _damaged(Path(dataset))):
            raise ValueError(f"the file '{damaged}' can't be read as parquet; replace or remove it") from None
        if local:
            raise ValueError(f"the files in '{dataset}' don't form one table ({_brief(error)}); mend them") from None
        raise FileNotFoundError(
            f"'{dataset}' is neither a folder here nor a data set that can be downloaded from the hub "
            f"({type(error).__name__}: {_brief(error)}); check the name and the network"
        ) from None
    text = next((column for column in COLUMNS if column in rows.column_names), None)
    if text is None or "image" not in rows.column_names:
        raise ValueError(f"the data set '{dataset}' needs columns 'image' and 'text'; it has {rows.column_names}")
    try:
        rows = rows.cast_column("image", datasets.Image(decode=False))
    except Exception:  # Arrow raises many kinds
        kind = reprlib.repr(rows.features["image"])
        raise ValueError(
            f"the column 'image' of the data set '{dataset}' holds {kind}; store the pictures' bytes in it"
        ) from None
    inside = str(Path(place).parent) if Path(place).is_file() else place
    found.captions[f"the column '{text}'"] += len(rows)
    return [_from_row(n, row["image"], row[text], f"row {n} of '{dataset}'", inside) for n, row in enumerate(rows)]


class _NoSplitError(ValueError):
    """A data set without pictures to train on."""


def _split(dataset: str, place: str, found: Found):
    """The rows of the split 'train', or of the only one. Raises _NoSplitError if there are others alone."""
    import datasets

    if Path(place).is_file():
        return datasets.load_dataset("parquet", data_files=place, split="train")
    try:
        rows = datasets.load_dataset(place, split="train")
    except ValueError as error:
        if "Unknown split" not in str(error):
            raise
        name, *more = datasets.get_dataset_split_names(place)
        if more:
            raise _NoSplitError(f"the data set '{dataset}' has no split 'train', only {', '.join((name, *more))}; "
                                "rename one, or set `dataset` to its file") from None  # fmt: skip
        found.say(f"the split '{name}' is taken: there is no 'train'")
        return datasets.load_dataset(place, split=name)
    for name in rows.info.splits or ():
        if name != "train":
            found.leave("another split than 'train'", name)
    return rows


def has_columns(file: Path) -> bool:
    """Whether a .parquet file can be read and has columns for pictures and captions."""
    import pyarrow.parquet

    try:
        columns = pyarrow.parquet.read_schema(file).names
    except Exception:  # Arrow raises many kinds
        return False
    return "image" in columns and any(column in columns for column in COLUMNS)


def _brief(error: Exception) -> str:
    return textwrap.shorten(str(error), 80, placeholder=" ...")


def _damaged(folder: Path) -> Path | None:
    """The first .parquet file in `folder` that is none."""
    import pyarrow.parquet

    for file in sorted(folder.rglob("*.parquet")) if folder.is_dir() else [folder]:
        try:
            pyarrow.parquet.read_schema(file)
        except Exception:
            return file
    return None


def _is_inside(file: Path, folder: str) -> bool:
    """Whether a file lies in the folder; it may be a link, as the hub's client makes them, but its folders may not."""
    return Path(os.path.realpath(file.parent)).is_relative_to(os.path.realpath(folder))


def _from_row(number: int, image: dict | None, caption, where: str, folder: str) -> Row:
    image = image or {}
    path, content = image.get("path") or "", image.get("bytes")
    name = Path(path).name or f"{number:05d}"
    if not content and not path:
        raise ValueError(f"{where} has no picture; store its bytes, or remove the row")
    if not content and "://" in path:
        raise ValueError(f"{where} has no picture but the address {path!r:.80}; store the picture's bytes")
    if not content:
        content = Path(os.path.abspath(Path(folder, path)))
        if not (os.path.isfile(content) and _is_inside(content, folder)):  # a stranger's table may name any file here
            raise ValueError(
                f"{where} has no picture but names {path!r:.80}, which is no file in its folder; "
                "store the picture's bytes"
            )
    return Row(name, "" if caption is None else caption, content)
