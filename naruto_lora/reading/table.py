"""Captioned pictures in a table, read by the `datasets` library: parquet files, or a data set on the hub."""

from __future__ import annotations

import os
import reprlib
import textwrap
from pathlib import Path

from .. import hub
from .folder import Row


def read(dataset: str) -> list[Row]:
    """(name, caption, file or bytes) of each row of a folder with parquet files, or of a hub data set.

    Raises FileNotFoundError if it can't be downloaded, ValueError if it can't be read, lacks the columns image and
    text, or names a picture that is not inside its folder.
    """
    import datasets

    local = Path(dataset).is_dir()
    try:
        place = dataset if local else str(hub.data_set(dataset))
        rows = datasets.load_dataset(place, split="train")
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
    if not {"image", "text"} <= set(rows.column_names):
        raise ValueError(f"the data set '{dataset}' needs columns 'image' and 'text'; it has {rows.column_names}")
    try:
        rows = rows.cast_column("image", datasets.Image(decode=False))
    except Exception:  # Arrow raises many kinds
        kind = reprlib.repr(rows.features["image"])
        raise ValueError(
            f"the column 'image' of the data set '{dataset}' holds {kind}; store the pictures' bytes in it"
        ) from None
    return [_from_row(number, row, f"row {number} of '{dataset}'", place) for number, row in enumerate(rows)]


def _brief(error: Exception) -> str:
    return textwrap.shorten(str(error), 80, placeholder=" ...")


def _damaged(folder: Path) -> Path | None:
    """The first .parquet file in `folder` that is none."""
    import pyarrow.parquet

    for file in sorted(folder.rglob("*.parquet")):
        try:
            pyarrow.parquet.read_schema(file)
        except Exception:
            return file
    return None


def _is_inside(file: Path, folder: str) -> bool:
    """Whether a file lies in the folder; it may be a link, as the hub's client makes them, but its folders may not."""
    return Path(os.path.realpath(file.parent)).is_relative_to(os.path.realpath(folder))


def _from_row(number: int, row: dict, where: str, folder: str) -> Row:
    image = row["image"] or {}
    path = image.get("path")
    name, content = Path(path or "").name or f"{number:05d}", image.get("bytes")
    if not content and path:
        content = Path(os.path.abspath(Path(folder, path)))
        if not (os.path.isfile(content) and _is_inside(content, folder)):  # a stranger's table may name any file here
            raise ValueError(
                f"{where} has no picture but names {path!r:.80}, which is no file in its folder; "
                "store the picture's bytes"
            )
    return Row(name, "" if row["text"] is None else row["text"], content or b"")
