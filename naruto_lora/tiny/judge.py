"""A small judge of portraits: it reads the eight attributes, and whether a picture is in the style to learn.

It was trained only on drawn pictures (`naruto_lora.tiny.pretrain`), never on generated ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from naruto_lora.tiny.world import ATTRIBUTES, read_caption

WEIGHTS = Path(__file__).parent / "judge.safetensors"
SIZE = 64  # px, the side of the pictures that it reads
WIDTHS = (32, 48, 96, 128)  # channels at 64, 32, 16 and 8 px
FIT_MEANS = "percent of the caption's attributes that the judge reads in the picture"
CLASSES = [len(classes) for classes in ATTRIBUTES.values()]


def _convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class Level(nn.Module):
    """Halves the side, then one residual pair of convolutions."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.down = _convolution(inputs, outputs, 2)
        self.pair = nn.Sequential(_convolution(outputs, outputs), _convolution(outputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        return x + self.pair(x)


class Judge(nn.Module):
    """(B, 3, 64, 64) pictures in -1..1 -> (B, sum of classes + 1) logits; the last one is the style's."""

    def __init__(self):
        super().__init__()
        self.stem = _convolution(3, WIDTHS[0])
        self.levels = nn.ModuleList(Level(a, b) for a, b in zip(WIDTHS, WIDTHS[1:], strict=False))
        self.head = nn.Linear(WIDTHS[-1] * 16, sum(CLASSES) + 1)

    def maps(self, pictures: Tensor) -> list[Tensor]:
        """The feature maps at 32, 16 and 8 px."""
        x, maps = self.stem(pictures), []
        for level in self.levels:
            x = level(x)
            maps.append(x)
        return maps

    def forward(self, pictures: Tensor) -> Tensor:
        x = self.maps(pictures)[-1]  # (B, 128, 8, 8)
        return self.head(nn.functional.avg_pool2d(x, 2).flatten(1))


def split(logits: Tensor) -> tuple[list[Tensor], Tensor]:
    """(B, sum + 1) logits -> one (B, classes) for each attribute, and the style's (B,)."""
    *attributes, style = logits.split([*CLASSES, 1], dim=1)
    return attributes, style[:, 0]


@cache
def load(path: str | Path = WEIGHTS) -> Judge:
    """The trained judge in fp32 on the CPU. Raises FileNotFoundError if its weights are missing."""
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise FileNotFoundError(
            f"the judge's weights are missing: {path}; `python -m naruto_lora.tiny.pretrain` creates them"
        )
    judge = Judge()
    judge.load_state_dict(load_file(path))
    return judge.float().eval().requires_grad_(False)


def _pixels(pictures: Sequence[Image.Image]) -> Tensor:
    """Pictures of any size -> (N, 3, 64, 64) in -1..1."""
    resized = [
        p if p.size == (SIZE, SIZE) else p.resize((SIZE, SIZE), Image.Resampling.BICUBIC) for p in pictures
    ]
    pixels = np.stack([np.asarray(picture.convert("RGB")) for picture in resized])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def read(pictures: Sequence[Image.Image], judge: Judge | None = None) -> list[dict]:
    """For each picture: {attribute: the class that it shows}, and "style": True or False."""
    judge = judge or load()
    found = []
    for start in range(0, len(pictures), 100):
        attributes, style = split(judge(_pixels(pictures[start : start + 100])))
        columns = [logits.argmax(1).tolist() for logits in attributes]
        for row, in_style in zip(zip(*columns, strict=True), (style > 0).tolist(), strict=True):
            named = zip(ATTRIBUTES.items(), row, strict=True)
            found.append({name: classes[index] for (name, classes), index in named} | {"style": in_style})
    return found


def score(pictures: Sequence[Image.Image], prompts: Sequence[Mapping], judge: Judge | None = None) -> dict:
    """Compares what pictures show with what their prompts ask for.

    Returns "attributes": (N,) share of the eight that are right in each picture, "style": (N,) 0 or 1, "legible":
    {name: (N,) whether it is right} and "by_attribute": {name: share of pictures}. Raises ValueError unless there is
    one prompt for each picture.
    """
    if len(pictures) != len(prompts):
        raise ValueError(f"{len(pictures)} pictures cannot be scored against {len(prompts)} prompts")
    found = read(pictures, judge)
    right = [
        [got[name] == asked["attributes"][name] for name in ATTRIBUTES]
        for got, asked in zip(found, prompts, strict=True)
    ]
    right = np.array(right, dtype=np.float64).reshape(len(found), len(ATTRIBUTES))
    return {
        "attributes": right.mean(axis=1),
        "style": np.array([got["style"] for got in found], dtype=np.float64),
        "legible": dict(zip(ATTRIBUTES, right.T, strict=True)),
        "by_attribute": dict(zip(ATTRIBUTES, right.mean(axis=0).tolist(), strict=True)) if len(found) else {},
    }


@torch.no_grad()
def embed(pictures: Sequence[Image.Image], judge: Judge | None = None) -> np.ndarray:
    """(N, 2048) of unit length: the last feature maps at 4 x 4 places, for distances between pictures."""
    judge, parts = judge or load(), []
    for start in range(0, len(pictures), 100):
        maps = judge.maps(_pixels(pictures[start : start + 100]))[-1]
        features = nn.functional.avg_pool2d(maps, 2).flatten(1)
        parts.append(nn.functional.normalize(features - features.mean(1, keepdim=True), dim=1))
    return torch.cat(parts).numpy()


def fit(pictures: Sequence[Image.Image], texts: Sequence[str], judge: Judge | None = None) -> np.ndarray:
    """(N,) percent of the attributes named in each caption that its picture shows."""
    prompts = [{"attributes": read_caption(text)} for text in texts]
    return 100 * score(pictures, prompts, judge)["attributes"]
