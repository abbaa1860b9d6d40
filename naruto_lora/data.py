"""Captioned pictures from a folder or the hub: loaded, checked, split, cropped. They stay compressed until used."""

from __future__ import annotations

import collections
import functools
import hashlib
import io
import json
import math
import re
import textwrap
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps

from . import files, hub

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
UNREADABLE = (OSError, SyntaxError, Image.DecompressionBombError)  # what Pillow raises
FEWEST = 3  # pictures to train on, and held out: style distance and copying can't be told from fewer
THREADS = 2  # that decode, beside each other since Pillow lets go of the interpreter; Colab has two cores
AHEAD = 32  # pictures decoded before they are asked for: 100 MB at 1024 px


@dataclass(frozen=True)
class Example:
    """One captioned picture: `source` is a file's path or the compressed bytes; `mirrored` swaps left and right."""

    name: str
    caption: str
    source: Path | bytes
    mirrored: bool = False

    def read(self) -> bytes:
        """The compressed picture. Raises FileNotFoundError if its file has gone."""
        try:
            return self.source if isinstance(self.source, bytes) else self.source.read_bytes()
        except FileNotFoundError:
            raise FileNotFoundError(f"the picture '{self.source}' has gone since the data set was read") from None

    @functools.cached_property
    def digest(self) -> bytes:
        """SHA-256 of the compressed picture, read once."""
        return hashlib.sha256(self.read()).digest()

    def size(self) -> tuple[int, int]:
        """(height, width) in px of the picture upright, from its header. Raises ValueError if it can't be read."""
        content = self.read()
        try:
            with Image.open(io.BytesIO(content)) as image:
                turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5  # by a quarter
                return image.size if turned else image.size[::-1]
        except UNREADABLE as error:
            raise ValueError(_unreadable(self.name, error)) from None

    def image(self) -> Image.Image:
        """The picture upright, in RGB, transparency on white. Raises ValueError if it can't be read."""
        content = self.read()
        try:
            image = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
            image = ImageOps.mirror(image) if self.mirrored else image
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
        except UNREADABLE as error:
            raise ValueError(_unreadable(self.name, error)) from None


def _unreadable(name: str, error: Exception) -> str:
    return f"the picture '{name}' can't be read ({error}); replace or remove it"


def load(dataset: str | Path) -> list[Example]:
    """Captioned pictures of a folder (metadata.jsonl, .txt beside each picture, or parquet), a zip of one or a hub id.

    Each picture is opened and each caption looked at, so that bad ones are named at once.
    Raises FileNotFoundError for a missing folder or hub data set, ValueError for anything wrong inside.
    """
    folder = Path(dataset).expanduser()
    if not str(dataset).strip():
        raise FileNotFoundError("no data set is named; give a folder or a hub id")
    if folder.suffix.lower() == ".zip":
        folder = files.unzip(folder)
    if folder.is_dir():
        examples = _from_folder(folder)
    elif _like_hub_id(dataset):
        examples = _from_hub(str(dataset))
    else:
        raise FileNotFoundError(f"the data set folder '{dataset}' does not exist; check the path, or give a hub id")
    if not examples:
        raise ValueError(
            f"the data set '{dataset}' has no pictures; it needs {', '.join(SUFFIXES)} files, each with a caption"
        )
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(_check, examples):  # raises for the first of the bad ones, whichever was met first
            pass
    return examples


def _like_hub_id(dataset) -> bool:
    return isinstance(dataset, str) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", dataset) is not None


def _check(example: Example) -> None:
    if not isinstance(example.caption, str):
        raise ValueError(f"the caption of '{example.name}' is not text but {example.caption!r:.40}; write one")
    if not example.caption.strip():
        raise ValueError(f"the caption of '{example.name}' is empty; write what the picture shows, or remove it")
    content = example.read()
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.draft("RGB", (64, 64))  # JPEGs decode at a fraction of the cost, yet to their last byte
            image.load()
    except UNREADABLE as error:
        raise ValueError(_unreadable(example.name, error)) from None


def _from_folder(folder: Path) -> list[Example]:
    if list(folder.rglob("*.parquet")):
        return _from_hub(str(folder))
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and _visible(p, folder))
    captions = _metadata(folder / "metadata.jsonl") if (folder / "metadata.jsonl").is_file() else None
    examples = []
    for file in files:
        name = file.relative_to(folder).as_posix()
        caption = captions.get(name) if captions is not None else _beside(file)
        if caption is None:
            where = "in metadata.jsonl" if captions is not None else f"in '{file.with_suffix('.txt').name}' beside it"
            raise ValueError(f"the picture '{name}' in '{folder}' has no caption; add one {where}")
        examples.append(Example(name, caption, file))
    for name in sorted(set(captions or ()) - {e.name for e in examples}):
        raise ValueError(f"metadata.jsonl in '{folder}' names '{name}', which is not there; add it or drop the line")
    return examples


def _visible(file: Path, folder: Path) -> bool:
    return file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)


def _beside(file: Path) -> str | None:
    text = file.with_suffix(".txt")
    return _text(text).strip() if text.is_file() else None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"the file '{file}' is not in UTF-8; save it again in that encoding") from None


def _metadata(file: Path) -> dict[str, str]:
    captions = {}
    for number, line in enumerate(_text(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            captions[row["file_name"]] = "" if row["text"] is None else row["text"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"line {number} of '{file}' must be one JSON object with 'file_name' and 'text'"
            ) from None
    return captions


def _from_hub(dataset: str) -> list[Example]:
    import datasets

    try:
        place = dataset if Path(dataset).is_dir() else str(hub.data_set(dataset))
        table = datasets.load_dataset(place, split="train")
    except Exception as error:  # the hub's client raises many kinds; a user needs one sentence
        if isinstance(error, (FileNotFoundError, TimeoutError)) and dataset in str(error):
            raise
        reason = textwrap.shorten(str(error), 80, placeholder=" ...")
        raise FileNotFoundError(
            f"'{dataset}' is neither a folder here nor a data set that can be fetched from the hub "
            f"({type(error).__name__}: {reason}); check the name and the network"
        ) from None
    if not {"image", "text"} <= set(table.column_names):
        raise ValueError(f"the data set '{dataset}' needs columns 'image' and 'text'; it has {table.column_names}")
    table = table.cast_column("image", datasets.Image(decode=False))
    return [_from_row(number, row) for number, row in enumerate(table)]


def _from_row(number: int, row: dict) -> Example:
    image = row["image"] or {}
    name = Path(image.get("path") or f"{number:05d}").name
    source = image.get("bytes") or (Path(image["path"]) if image.get("path") else b"")
    return Example(name, "" if row["text"] is None else row["text"], source)


def look(examples: list[Example], resolution: int) -> list[dict]:
    """Rows for a table: what in a data set may spoil a LoRA at `resolution` px, how often, and an example of each."""
    sizes = [example.size() for example in examples]
    seen, captions = set(), collections.Counter(example.caption.strip() for example in examples)
    faults = {
        f"smaller than {resolution} px: blurred": [e for e, size in zip(examples, sizes, strict=True)
                                                   if min(size) < resolution],
        "a third or more is cropped away": [e for e, size in zip(examples, sizes, strict=True)
                                            if min(size) < 2 / 3 * max(size)],
        "the same picture again": [e for e in examples if e.digest in seen or seen.add(e.digest)],
        "a caption that others have too": [e for e in examples if captions[e.caption.strip()] > 1],
        "a caption of 60 words or more: its end may not be read": [e for e in examples if len(e.caption.split()) >= 60],
    }  # fmt: skip
    return [
        {"what": what, "pictures": f"{len(f)} of {len(examples):,}", "for example": f[0].name if f else ""}
        for what, f in faults.items()
    ]


def split(examples: list[Example], holdout: float) -> tuple[list[Example], list[Example]]:
    """(training, hold-out) by each picture's own bytes, so that pictures added to a hundred or more move none across.

    About `holdout` of the pictures are held out, and at least three unless it is 0: figures with intervals need them.
    Raises ValueError if as many aren't left to train on.
    """
    if holdout == 0:
        return list(examples), []
    places = [int.from_bytes(e.digest[:4]) / 16**8 for e in examples]
    least = max(holdout, sorted(places)[:FEWEST][-1] + 16**-9)
    held = [e for e, place in zip(examples, places, strict=True) if place < least]
    train = [e for e, place in zip(examples, places, strict=True) if place >= least]
    if len(train) < FEWEST:
        raise ValueError(f"with holdout {holdout:g} {len(train)} of {len(examples)} pictures are left to train on, "
                         f"fewer than {FEWEST}: add pictures, or choose a recipe with holdout 0")
    return train, held


def fingerprint(examples: list[Example]) -> str:
    """Sixteen hex digits of the pictures' bytes and captions, in their order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(example.digest + hashlib.sha256(example.caption.encode()).digest())
    return digest.hexdigest()[:16]


def buckets(resolution: int) -> list[tuple[int, int]]:
    """Sizes (height, width) in px of about resolution**2 px each, from 1:4 to 4:1.

    Sides are multiples of a sixteenth of `resolution` (64 px at 1024), and of 8 px, what a latent's pixel spans.
    Source: multi-aspect training of the SDXL report, arXiv 2307.01952, section 2.3 and appendix I.
    """
    unit = max(8, resolution // 16 // 8 * 8)
    first, last = math.ceil(resolution / 2 / unit), round(resolution / unit)
    short = [unit * n for n in range(first, last + 1)]
    sizes = [(side, unit * round(resolution**2 / side / unit)) for side in short]
    return sorted({*sizes, *(size[::-1] for size in sizes)})


def bucket(size: tuple[int, int], resolution: int) -> tuple[int, int]:
    """The (height, width) of `buckets(resolution)` whose aspect ratio is nearest to that of `size` in its logarithm."""
    height, width = size
    return min(buckets(resolution), key=lambda b: abs(math.log(b[0] / b[1] * width / height)))


def crop(image: Image.Image, size: int | tuple[int, int]) -> tuple[Image.Image, tuple[int, ...]]:
    """The picture resized so that it just covers `size`, (height, width) or a square's side in px; then a centre crop.

    Returns the picture and SDXL's six size conditions: original height and width, crop top and left (px after
    the resize), target height and width. Source: SDXL report, arXiv 2307.01952, section 2.2.
    """
    width, height = image.size
    high, wide = (size, size) if isinstance(size, int) else size
    scale = max(wide / width, high / height)
    full_wide, full_high = max(wide, round(width * scale)), max(high, round(height * scale))
    left, top = (full_wide - wide) // 2, (full_high - high) // 2
    image = image.resize((full_wide, full_high), Image.LANCZOS, reducing_gap=3.0)
    return image.crop((left, top, left + wide, top + high)), (height, width, top, left, high, wide)


class Crop(NamedTuple):
    """A picture as the VAE wants it."""

    name: str
    pixels: np.ndarray  # (H, W, 3), uint8
    time_ids: tuple[int, ...]  # SDXL's six size conditions


def decode(example: Example, size: int | tuple[int, int]) -> Crop:
    """The example's picture, decoded and cropped to `size`. Raises ValueError if it can't be read."""
    image, time_ids = crop(example.image(), size)
    return Crop(example.name, np.array(image, dtype=np.uint8), time_ids)


def decode_ahead(rows: Iterable[tuple[Example, int | tuple[int, int]]]) -> Iterator[Crop]:
    """`decode` of each row in order, in threads that run no more than AHEAD pictures ahead.

    Closing it waits for no more than the pictures that are being decoded.
    """
    waiting = deque()
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            for row in rows:
                waiting.append(pool.submit(decode, *row))
                if len(waiting) > AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def pixels(images: list[Image.Image]):
    """RGB pictures of one size as a float32 tensor (B, 3, H, W) in [-1, 1]."""
    import torch

    return unit(torch.from_numpy(np.stack([np.asarray(image.convert("RGB"), dtype=np.uint8) for image in images])))


def unit(stack):
    """Pixels (B, H, W, 3) in uint8 as a float32 tensor (B, 3, H, W) in [-1, 1], where they are."""
    return stack.permute(0, 3, 1, 2).float() / 127.5 - 1
