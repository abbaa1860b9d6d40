"""Pictures compared by their embeddings: style distance, drift, diversity, copying.

Embeddings are (..., D) of unit length, from `encoders`. Pictures are given as prompts x seeds, (P, S, D), and every
interval is over prompts: two seeds of one prompt are not independent pictures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..reading.alike import dhash as dhash
from .metrics import Figure, mean, student

SIGMA, SCALE = 10.0, 1000.0  # CMMD's kernel width, and the factor that makes its values readable
CHANCE = 0.01  # copying is reported if its probability by chance is lower


def cmmd(pictures, real) -> Figure:
    """Squared maximum mean discrepancy of `pictures` (P, S, D) from `real` (M, D): CMMD (arXiv 2401.09603).

    The unbiased estimate (Gretton et al., JMLR 13, 2012, 723), without pairs of a prompt with itself: fewer pictures
    don't raise it, and it can be below 0. The interval is a jackknife over prompts and real pictures.
    """
    x, y = _grouped(pictures), _grouped(np.asarray(real)[:, None])
    (xx, xx_left), (yy, yy_left), (xy, xy_left_x, xy_left_y) = _within(x), _within(y), _between(x, y)
    return _jackknife(xx + yy - 2 * xy, xx_left - 2 * xy_left_x, yy_left - 2 * xy_left_y)


def cmmd_change(before, after, real) -> Figure:
    """`cmmd` of `after` minus that of `before`, both (P, S, D) of the same prompts and seeds, as paired samples."""
    y, parts = _grouped(np.asarray(real)[:, None]), list[tuple]()
    for pictures in (before, after):
        x = _grouped(pictures)
        (xx, xx_left), (xy, xy_left_x, xy_left_y) = _within(x), _between(x, y)
        parts.append((xx - 2 * xy, xx_left - 2 * xy_left_x, -2 * xy_left_y))
    return _jackknife(*(b - a for a, b in zip(*parts, strict=True)))


def _grouped(pictures) -> np.ndarray:
    """(P, S, D) in float64. Raises ValueError for fewer than three groups: the jackknife leaves one out."""
    pictures = np.asarray(pictures, dtype=float)
    if len(pictures) < 3:
        raise ValueError(f"a style distance needs at least 3 prompts and 3 real pictures, not {len(pictures)}")
    return pictures


def _sums(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The kernel, summed over all members of each pair of groups: (P, S, D), (Q, T, D) -> (P, Q)."""
    a, b = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    squares = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    kernel = SCALE * np.exp(-np.maximum(squares, 0) / (2 * SIGMA**2))
    return kernel.reshape(len(x), x.shape[1], len(y), y.shape[1]).sum(axis=(1, 3))


def _within(x: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean kernel over pairs of different groups, and (P,) the same with each group left out."""
    sums, count = _sums(x, x), len(x)
    np.fill_diagonal(sums, 0)
    left = sums.sum() - 2 * sums.sum(axis=1)
    pairs = x.shape[1] ** 2
    return sums.sum() / (count * (count - 1) * pairs), left / ((count - 1) * (count - 2) * pairs)


def _between(x: np.ndarray, y: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Mean kernel over all pairs, (P,) with each group of `x` left out, (Q,) with each of `y` left out."""
    sums, pairs = _sums(x, y), x.shape[1] * y.shape[1]
    p, q = sums.shape
    left = [(sums.sum() - sums.sum(axis=1)) / ((p - 1) * q), (sums.sum() - sums.sum(axis=0)) / (p * (q - 1))]
    return sums.sum() / (p * q * pairs), left[0] / pairs, left[1] / pairs


def _jackknife(value: float, *left_out: np.ndarray) -> Figure:
    """The interval from the leave-one-out values of each independent sample (Efron and Stein 1981)."""
    variance = sum((len(left) - 1) * left.var() for left in left_out)
    half = student(min(map(len, left_out)) - 1) * math.sqrt(variance)
    return Figure(float(value), float(value - half), float(value + half), len(left_out[0]))


def drift(base, adapted) -> Figure:
    """How far the pictures have moved from the base's: the mean of `moved`."""
    return mean(moved(base, adapted))


def moved(base, adapted) -> np.ndarray:
    """(P,) how far the pictures (P, S, D) of the same prompts and seeds have moved from the base's, S >= 2.

    The unit is the base's distance between seeds: 0 is the same picture, 1 as far as another seed of the same prompt.
    """
    base, adapted = np.asarray(base, float), np.asarray(adapted, float)
    distance = (1 - (base * adapted).sum(-1)).mean(axis=1)  # (P,) of cosines
    spread = _spread(base).mean()
    if spread < 1e-9:
        raise ValueError("the base draws the same picture for every seed, so drift has no unit; use other prompts")
    return distance / spread


def diversity(pictures) -> Figure:
    """Cosine distance between seeds of one prompt, (P, S, D), S >= 2, averaged over prompts; 0: all are the same."""
    return mean(_spread(np.asarray(pictures, float)))


def diversity_change(before, after) -> Figure:
    """`diversity` of `after` minus that of `before`, prompt by prompt."""
    return mean(_spread(np.asarray(after, float)) - _spread(np.asarray(before, float)))


def _spread(pictures: np.ndarray) -> np.ndarray:
    """(P, S, D) -> (P,) mean cosine distance between two different seeds."""
    seeds = pictures.shape[1]
    if seeds < 2:
        raise ValueError("drift and diversity need at least 2 seeds a prompt, not 1")
    total = pictures.sum(axis=1)
    alike = ((total**2).sum(-1) - (pictures**2).sum(axis=(1, 2))) / (seeds * (seeds - 1))
    return 1 - alike


@dataclass(frozen=True)
class Copying:
    """How near pictures of training captions come to those captions' own training pictures."""

    n: int  # training captions that were drawn
    near: int  # those whose picture is nearer to its training picture than any hold-out caption's to its own
    near_hash: int  # the same by perceptual hash instead of embedding
    chance: float  # the probability of so many by chance: the smaller of the two, doubled
    pairs: list[tuple[int, int, float]]  # (index of the generated picture, of its nearest training picture, distance)

    @property
    def flagged(self) -> bool:
        """Whether the model has memorised pictures."""
        return self.chance < CHANCE

    def __str__(self) -> str:
        return f"{max(self.near, self.near_hash)} of {self.n} (p = {self.chance:.2g})"


def copying(generated, training, control, holdout, hashes: tuple | None = None) -> Copying:
    """Whether `generated` (P, S, D), drawn from training captions, are memorised training pictures.

    `training` (M, D) and `holdout` (H, D) are real pictures; the first P and Q belong to the captions that were drawn.
    `control` (Q, S, D) is drawn from hold-out captions: any caption brings a picture near to its real one, so only
    pictures nearer than every control count. A distance is relative to the mean distance to the other real pictures
    (as in Carlini et al. 2023, arXiv 2301.13188); the nearest seed counts. `hashes` are the four sets' `dhash`es in
    the same shapes. Raises ValueError for fewer than 3 real pictures.
    """
    sets = [np.asarray(part, float) for part in (generated, training, control, holdout)]
    own, nearest = _relative(_distances(sets[0], sets[1]))
    near, chance = _nearer(own, _relative(_distances(sets[2], sets[3]))[0])
    near_hash = 0
    if hashes:
        near_hash, by_hash = _nearer(*(_relative(_bits(*pair))[0] for pair in (hashes[:2], hashes[2:])))
        chance = min(1.0, 2 * min(chance, by_hash))
    seeds, flat = sets[0].shape[1], own.reshape(-1)
    pairs = [(int(k), int(nearest[k]), float(flat[k])) for k in np.argsort(flat)]
    return Copying(len(flat) // seeds, near, near_hash, chance, pairs)


def _distances(pictures, real) -> np.ndarray:
    """Euclidean distances: (P, S, D), (M, D) of unit length -> (P, S, M)."""
    return np.sqrt(np.maximum(2 - 2 * pictures @ real.T, 0))


def _bits(pictures, real) -> np.ndarray:
    """Count of different bits: (P, S, 64), (M, 64) -> (P, S, M)."""
    return (pictures[:, :, None] != real).sum(axis=3)


def _relative(distances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(P, S, M) -> (P, S) distance to real picture p, relative to the others' mean; (P * S,) index of the nearest."""
    count = distances.shape[2]
    if count < 3 or count < len(distances):
        raise ValueError(f"copying needs at least 3 real pictures, and one for each caption, not {count}")
    own = distances[np.arange(len(distances)), :, np.arange(len(distances))]  # (P, S)
    others = (distances.sum(axis=2) - own) / (count - 1)
    return own / np.maximum(others, 1e-9), distances.reshape(-1, count).argmin(axis=1)


def _nearer(own: np.ndarray, control: np.ndarray) -> tuple[int, float]:
    """How many of `own` (P, S) are nearer than every `control` (Q, S), by their nearest seed; the chance of so many."""
    near = int((own.min(axis=1) < control.min()).sum())
    return near, _chance(near, len(own), len(control))


def _chance(near: int, drawn: int, held: int) -> float:
    """P(the `near` smallest of `drawn` + `held` exchangeable values are all drawn ones): C(n, k) / C(n + h, k)."""
    return math.comb(drawn, near) / math.comb(drawn + held, near)
