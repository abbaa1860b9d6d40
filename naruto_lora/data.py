"""Captioned pictures from a folder, a zip or the hub: loaded, checked, split, cropped; compressed until used."""

from __future__ import annotations

import functools
import hashlib
import reprlib
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from .reading import captions, layout, picture, words
from .reading.faults import look as look
from .reading.picture import crop
from .reading.report import Found

FEWEST = 3  # pictures to train on, and held out: fewer can't show style distance or copying
THREADS = 2  # for decoding, in parallel because Pillow releases the GIL; Colab has two cores
AHEAD = 32  # pictures decoded before they are needed: 100 MB at 1024 px


@dataclass(frozen=True)
class Example:
    """One captioned picture: `source` is a file's path or its compressed bytes; `mirrored` swaps left and right."""

    name: str
    caption: str
    source: Path | bytes
    mirrored: bool = False
    wordless: bool = False  # its caption is empty on purpose
    repeats: int = 1  # how often it is among the training pictures

    def read(self) -> bytes:
        """The compressed picture. Raises FileNotFoundError if its file is no longer there."""
        try:
            return self.source if isinstance(self.source, bytes) else self.source.read_bytes()
        except FileNotFoundError as e:
            raise FileNotFoundError(f"the picture '{e.filename}' is gone; restore it or load the data again") from None

    @functools.cached_property
    def digest(self) -> bytes:
        """SHA-256 of the compressed picture, read once."""
        return hashlib.sha256(self.read()).digest()

    def size(self) -> tuple[int, int]:
        """(height, width) in px of the picture upright, from its header. Raises ValueError if it can't be read."""
        return self._readable(picture.size)

    def image(self) -> Image.Image:
        """The picture upright, in RGB, transparency on white. Raises ValueError if it can't be read."""
        return self._readable(functools.partial(picture.upright, mirrored=self.mirrored))

    def check(self) -> None:
        """Raises ValueError for a picture that can't be decoded, or a caption that is empty or not text."""
        if not isinstance(self.caption, str):
            raise ValueError(f"the caption of {self.name!r} is not text but {reprlib.repr(self.caption)}; make it text")
        if words.is_empty(self.caption) and not self.wordless:
            raise ValueError(f"the caption of {self.name!r} is empty; write what the picture shows, or remove it")
        self._readable(picture.check)

    def _readable(self, read):
        content = self.read()
        try:
            return read(content)
        except picture.UNREADABLE as error:
            raise ValueError(f"the picture {self.name!r} can't be read ({error!s:.99}); replace or remove it") from None


def load(dataset: str | Path, captioned: bool = True, show=None, found: Found | None = None) -> list[Example]:
    """Captioned pictures of a folder (metadata files, texts beside pictures, parquet), an archive of one, or a hub id.

    Checks each picture and caption; with `captioned` False a picture may lack its caption. `show.note` gets a line on
    each kind of thing that was left out; a `found` without a `show` is only filled in, for `report.rows`. Raises
    FileNotFoundError for a missing folder or hub data set, ValueError for the first thing that is wrong inside.
    """
    told, found = show is not None or found is None, found or Found()
    with layout.opened(dataset, found) as rows, ThreadPoolExecutor(THREADS) as pool:
        examples = [Example(row.name, row.caption, row.source, repeats=row.repeats) for row in rows]
        examples = captions.apply(examples, layout.clean(dataset), captioned)
        deque(pool.map(Example.check, examples), maxlen=0)  # raises for the first bad one
    if told:
        found.tell(show)
    return examples


def split(examples: list[Example], holdout: float) -> tuple[list[Example], list[Example]]:
    """(training, hold-out) by each picture's bytes, so that new pictures in a set of a hundred or more move no others.

    The hold-out is about a share `holdout` of the pictures, and at least FEWEST unless `holdout` is 0. A training
    picture comes as often as it `repeats`. Raises ValueError if fewer than FEWEST are left to train on.
    """
    if holdout == 0:
        return _repeated(examples), []
    places = [int.from_bytes(e.digest[:4]) / 16**8 for e in examples]
    least = max(holdout, sorted(places)[:FEWEST][-1] + 16**-9)
    held = [e for e, place in zip(examples, places, strict=True) if place < least]
    train = [e for e, place in zip(examples, places, strict=True) if place >= least]
    if len(train) < FEWEST:
        raise ValueError(f"with holdout {holdout:g}, {len(train)} of {len(examples)} pictures are left to train on, "
                         f"fewer than {FEWEST}: add pictures, or choose a recipe with holdout 0")
    return _repeated(train), held


def _repeated(examples: list[Example]) -> list[Example]:
    return [example for example in examples for _ in range(example.repeats)]


def fingerprint(examples: list[Example]) -> str:
    """A hash (16 hex digits) of the pictures' bytes and captions, in their order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(example.digest + hashlib.sha256(example.caption.encode()).digest())
    return digest.hexdigest()[:16]


class Crop(NamedTuple):
    """A picture of the size that the VAE gets."""

    name: str
    pixels: np.ndarray  # (H, W, 3), uint8
    time_ids: tuple[int, ...]  # SDXL's six size conditions


def decode(example: Example, size: int | tuple[int, int]) -> Crop:
    """The example's picture, decoded and cropped to `size`. Raises ValueError if it can't be read."""
    image, time_ids = crop(example.image(), size)
    return Crop(example.name, np.array(image, dtype=np.uint8), time_ids)


def decode_ahead(rows: Iterable[tuple[Example, int | tuple[int, int]]]) -> Generator[Crop]:
    """`decode` of each row in order, in threads that run at most AHEAD pictures ahead.

    Closing it waits only for the pictures that are being decoded.
    """
    waiting: deque[Future[Crop]] = deque()
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

    return normalize(torch.from_numpy(np.stack([np.asarray(image.convert("RGB"), dtype=np.uint8) for image in images])))


def normalize(stack):
    """Pixels (B, H, W, 3), a uint8 tensor, as float32 (B, 3, H, W) in [-1, 1], on the same device."""
    return stack.permute(0, 3, 1, 2).float() / 127.5 - 1
