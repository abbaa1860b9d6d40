"""Pictures compared by their pixels: which are nearly the same, which is unlike all others, which is blurred."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image

HASHED, NEAR = 8, 14.0  # nearly the same: at most so many of 64 bits of `dhash`, and so much mean difference of 255
ODD = 5.0  # robust deviations from the other pictures
UNITS = np.array([0.05, 0.03, 0.05, 0.03, 0.01, 0.03, 0.04, 0.008])  # the least deviations of `measures` within a style
BLURRED = 0.05  # `sharpness` of a picture out of focus


class Look(NamedTuple):
    """What is kept of a picture to compare it."""

    hash: np.ndarray  # (64,) bool
    thumb: np.ndarray  # (16, 16, 3), 0..255
    measures: np.ndarray  # (8,) brightness, colour and edges, in UNITS
    sharp: float


def look(picture: Image.Image) -> Look:
    """Reduces a picture in RGB, of the size that training uses."""
    thumb = np.asarray(picture.resize((16, 16), Image.Resampling.BOX), dtype=np.float32)
    small = picture.copy()
    small.thumbnail((128, 128), Image.Resampling.BOX)
    pixels = np.asarray(small, dtype=np.float32) / 255
    grey, colour = pixels.mean(2), pixels.max(2) - pixels.min(2)
    steps = np.abs(np.diff(grey, axis=1))
    measures = [grey.mean(), grey.std(), colour.mean(), colour.std(), *np.percentile(steps, [75, 90, 98]), steps.mean()]
    return Look(dhash([picture])[0], thumb, np.array(measures) / UNITS, sharpness(picture))


def dhash(pictures) -> np.ndarray:
    """(N, 64) bool, the 'difference hash': whether each of 8 x 8 places is brighter than its right neighbour.

    Pictures whose hashes differ in few bits look nearly the same.
    """
    small = [np.asarray(p.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=int) for p in pictures]
    pixels = np.stack(small)
    return (pixels[:, :, 1:] < pixels[:, :, :-1]).reshape(len(small), 64)


def sharpness(picture: Image.Image) -> float:
    """How steep a picture's sharpest edges are: the 99.5th percentile of what halving its side loses, by its contrast.

    About 0.25 to 0.4 for a sharp drawing, 0.15 for one enlarged to twice its size, 0.03 for a blur of 2 px.
    """
    grey = picture.convert("L")
    half = grey.resize((max(1, grey.width // 2), max(1, grey.height // 2)), Image.Resampling.BOX)
    full, rough = (np.asarray(p, np.float32) for p in (grey, half.resize(grey.size, Image.Resampling.BILINEAR)))
    low, high = np.percentile(full, [1, 99])
    return float(np.percentile(np.abs(full - rough), 99.5) / max(high - low, 8.0))


def near_pairs(looks: list[Look]) -> list[tuple[int, int]]:
    """(first, again) indices of pictures that are nearly the same, each `again` once: re-saved, resized, brightened."""
    pairs, hashes = [], np.stack([one.hash for one in looks])
    thumbs = np.stack([one.thumb for one in looks])
    for again in range(1, len(looks)):
        candidates = np.flatnonzero((hashes[:again] != hashes[again]).sum(1) <= HASHED)
        for first in candidates:
            shift = thumbs[first].mean() - thumbs[again].mean()
            if np.abs(thumbs[first] - thumbs[again] - shift).mean() <= NEAR and abs(shift) < 4 * NEAR:
                pairs.append((int(first), again))
                break
    return pairs


def odd(vectors: np.ndarray, least: float = 1e-3) -> list[int]:
    """Indices of rows of (N, D) that are unlike all others, the oddest first; none of fewer than 8 rows.

    A row's distance is that from the medians, each column in robust units (1.4826 x the median absolute deviation,
    `least` at least). It counts where it is more than ODD such units above the rows' median distance.
    """
    if len(vectors) < 8:
        return []
    centre = np.median(vectors, axis=0)
    spread = 1.4826 * np.median(np.abs(vectors - centre), axis=0)
    distance = np.sqrt((((vectors - centre) / np.maximum(spread, least)) ** 2).mean(axis=1))
    middle = np.median(distance)
    unit = max(1.4826 * np.median(np.abs(distance - middle)), 0.1 * middle, 1e-6)
    return [int(k) for k in np.argsort(-distance) if distance[k] > middle + ODD * unit]
