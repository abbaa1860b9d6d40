"""A captioner of the picture world: the judge reads the attributes, `world.caption` says them in its varied words.

`captioning.captioners.load("naruto_lora.tiny.captioner")` finds it. Its captions can be compared with the truth.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from naruto_lora.tiny import judge, world


def describe(pictures: Sequence[Image.Image]) -> list[str]:
    """A caption for each picture, the same for the same pixels."""
    found = judge.read(pictures)
    seeds = [int.from_bytes(hashlib.sha256(picture.tobytes()).digest()[:8]) for picture in pictures]
    return [world.caption(named, np.random.default_rng(seed)) for named, seed in zip(found, seeds, strict=True)]
