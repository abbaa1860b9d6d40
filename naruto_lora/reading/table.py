"""Captioned pictures in a table, read by the `datasets` library: parquet files, or a data set on the hub."""

from __future__ import annotations

import textwrap
from pathlib import Path

from .. import hub
from .folder import Row


def read(dataset: str) -> list[Row]:
    """(name, caption, file or bytes) of each row of a folder with parquet files, or of a hub data set.

    Raises FileNotFoundError if it can't be downloaded, ValueError if it lacks the columns image and text.
    """
    import datasets

    try:
        place = dataset if Path(dataset).is_dir() else str(hub.data_set(dataset))
        rows = datasets.load_dataset(place, split="train")
    except Exception as error:  # the hub's client raises many kinds; a user needs one sentence
        if isinstance(error, (FileNotFoundError, TimeoutError)) and dataset in str(error):
            raise
        reason = textwrap.shorten(str(error), 80, placeholder=" ...")
        raise FileNotFoundError(
            f"'{dataset}' is neither a folder here nor a data set that can be downloaded from the hub "
            f"({type(error).__name__}: {reason}); check the name and the network"
        ) from None
    if not {"image", "text"} <= set(rows.column_names):
        raise ValueError(f"the data set '{dataset}' needs columns 'image' and 'text'; it has {rows.column_names}")
    rows = rows.cast_column("image", datasets.Image(decode=False))
    return [_from_row(number, row) for number, row in enumerate(rows)]


def _from_row(number: int, row: dict) -> Row:
    image = row["image"] or {}
    name = Path(image.get("path") or f"{number:05d}").name
    source = image.get("bytes") or (Path(image["path"]) if image.get("path") else b"")
    return name, "" if row["text"] is None else row["text"], source
