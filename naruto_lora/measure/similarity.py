"""Pictures compared by what an encoder sees in them: style distance, drift, diversity, copying.

Embeddings are (..., D) of unit length, from `encoders`. Pictures come as prompts x seeds, (P, S, D), and every
interval is one over prompts: two seeds of a prompt are no independent pictures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .metrics import Figure, mean, student

SIGMA, SCALE = 10.0, 1000.0  # CMMD's kernel width, and the factor that makes its values readable
CHANCE = 0.01  # copying is told if chance alone would show as much more seldom


def cmmd(pictures, real) -> Figure:
    """Squared maximum mean discrepancy of `pictures` (P, S, D) from `real` (M, D): CMMD (arXiv 2401.09603).

    The unbiased estimate (Gretton et al., JMLR 13, 2012, 723), without pairs of a prompt with itself: fewer pictures
    don't raise it, and it can be below 0. The interval is a jackknife's, over prompts and over real pictures.
    """
    x, y = _grouped(pictures), _grouped(np.asarray(real)[:, None])
    (xx, xx_left), (yy, yy_left), (xy, xy_left_x, xy_left_y) = _within(x), _within(y), _between(x, y)
    return _jackknife(xx + yy - 2 * xy, xx_left - 2 * xy_left_x, yy_left - 2 * xy_left_y)


def cmmd_change(before, after, real) -> Figure:
    """`cmmd` of `after` less that of `before`, both (P, S, D) of the same prompts and seeds: in pairs."""
    y, parts = _grouped(np.asarray(real)[:, None]), []
    for pictures in (before, after):
        x = _grouped(pictures)
        (xx, xx_left), (xy, xy_left_x, xy_left_y) = _within(x), _between(x, y)
        parts.append((xx - 2 * xy, xx_left - 2 * xy_left_x, -2 * xy_left_y))
    return _jackknife(*(b - a for a, b in zip(*parts, strict=True)))


def _grouped(pictures) -> np.ndarray:
    """(P, S, D) in float64. Raises ValueError below three groups: the jackknife leaves one out."""
    pictures = np.asarray(pictures, dtype=float)
    if len(pictures) < 3:
        raise ValueError(f"a style distance needs at least 3 prompts and 3 real pictures, not {len(pictures)}")
    return pictures


def _sums(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The kernel summed over the members of each two groups: (P, S, D), (Q, T, D) -> (P, Q)."""
    a, b = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    squares = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    kernel = SCALE * np.exp(-np.maximum(squares, 0) / (2 * SIGMA**2))
    return kernel.reshape(len(x), x.shape[1], len(y), y.shape[1]).sum(axis=(1, 3))


def _within(x: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean kernel over pairs of different groups, and (P,) the same without each group."""
    sums, count = _sums(x, x), len(x)
    np.fill_diagonal(sums, 0)
    left = sums.sum() - 2 * sums.sum(axis=1)
    pairs = x.shape[1] ** 2
    return sums.sum() / (count * (count - 1) * pairs), left / ((count - 1) * (count - 2) * pairs)


def _between(x: np.ndarray, y: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Mean kernel over all pairs, (P,) without each group of `x`, (Q,) without each of `y`."""
    sums, pairs = _sums(x, y), x.shape[1] * y.shape[1]
    p, q = sums.shape
    left = [(sums.sum() - sums.sum(axis=1)) / ((p - 1) * q), (sums.sum() - sums.sum(axis=0)) / (p * (q - 1))]
    return sums.sum() / (p * q * pairs), left[0] / pairs, left[1] / pairs


def _jackknife(value: float, *left_out: np.ndarray) -> Figure:
    """The interval from the values without each member of each independent sample (Efron and Stein 1981)."""
    variance = sum((len(left) - 1) * left.var() for left in left_out)
    half = student(min(map(len, left_out)) - 1) * math.sqrt(variance)
    return Figure(float(value), float(value - half), float(value + half), len(left_out[0]))


def drift(base, adapted) -> Figure:
    """How far pictures have moved from the base's: the mean of `moved`."""
    return mean(moved(base, adapted))


def moved(base, adapted) -> np.ndarray:
    """(P,) how far the pictures (P, S, D) of the same prompts and seeds have moved from the base's, S >= 2.

    In units of the base's own spread: 0 is the same picture, 1 as far as another seed's picture of such a prompt.
    """
    base, adapted = np.asarray(base, float), np.asarray(adapted, float)
    distance = (1 - (base * adapted).sum(-1)).mean(axis=1)  # (P,) of cosines
    spread = _spread(base).mean()
    if spread < 1e-9:
        raise ValueError("the base draws the same picture for every seed, so drift has no unit; take other prompts")
    return distance / spread


def diversity(pictures) -> Figure:
    """Cosine distance between seeds of one prompt, (P, S, D), S >= 2, averaged over prompts; 0: all the same."""
    return mean(_spread(np.asarray(pictures, float)))


def diversity_change(before, after) -> Figure:
    """`diversity` of `after` less that of `before`, prompt by prompt."""
    return mean(_spread(np.asarray(after, float)) - _spread(np.asarray(before, float)))


def _spread(pictures: np.ndarray) -> np.ndarray:
    """(P, S, D) -> (P,) mean cosine distance of two different seeds."""
    seeds = pictures.shape[1]
    if seeds < 2:
        raise ValueError("how far seeds differ needs at least 2 seeds a prompt, not 1")
    total = pictures.sum(axis=1)
    alike = ((total**2).sum(-1) - (pictures**2).sum(axis=(1, 2))) / (seeds * (seeds - 1))
    return 1 - alike


@dataclass(frozen=True)
class Copying:
    """How near pictures of training captions come to those captions' own training pictures."""

    n: int  # training captions drawn
    near: int  # of them nearer to their picture than any hold-out caption comes to its own, by embedding
    near_hash: int  # the same by perceptual hash
    chance: float  # the probability of as many by chance, the smaller of the two, doubled
    pairs: list[tuple[int, int, float]]  # (place of the generated picture, of its nearest training picture, distance)

    @property
    def flagged(self) -> bool:
        return self.chance < CHANCE

    def __str__(self) -> str:
        return f"{max(self.near, self.near_hash)} of {self.n} (p = {self.chance:.2g})"


def copying(generated, training, control, holdout, hashes: tuple | None = None) -> Copying:
    """Whether pictures of training captions, `generated` (P, S, D), are those captions' pictures learnt by heart.

    `training` (M, D) and `holdout` (H, D) are real pictures, their first ones those of the captions drawn. `control`
    (Q, S, D) is drawn from hold-out captions: a caption alone brings a picture near to its own, so only what
    is nearer than every control counts. A distance is in units of that to the other real pictures (as Carlini et al.
    2023, arXiv 2301.13188, relate it), the nearest seed's. `hashes` are the four sets' `dhash`es, shaped likewise.
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
    """(P, S, D), (M, D) of unit length -> (P, S, M)."""
    return np.sqrt(np.maximum(2 - 2 * pictures @ real.T, 0))


def _bits(pictures, real) -> np.ndarray:
    """(P, S, 64), (M, 64) -> (P, S, M) bits that differ."""
    return (pictures[:, :, None] != real).sum(axis=3)


def _relative(distances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(P, S, M) -> (P, S) distance of each picture to real picture p over the mean of the others; (P * S,) nearest."""
    count = distances.shape[2]
    if count < 3 or count < len(distances):
        raise ValueError(f"copying shows against 3 real pictures or more, one a caption at least, not {count}")
    own = distances[np.arange(len(distances)), :, np.arange(len(distances))]  # (P, S)
    others = (distances.sum(axis=2) - own) / (count - 1)
    return own / np.maximum(others, 1e-9), distances.reshape(-1, count).argmin(axis=1)


def _nearer(own: np.ndarray, control: np.ndarray) -> tuple[int, float]:
    """How many captions (P, S) come nearer than every control (Q, S), by their nearest seed; the chance of as many."""
    near = int((own.min(axis=1) < control.min()).sum())
    return near, _chance(near, len(own), len(control))


def _chance(near: int, drawn: int, held: int) -> float:
    """P(the `near` smallest of `drawn` + `held` exchangeable values are all of the drawn): C(n, k) / C(n + h, k)."""
    return math.comb(drawn, near) / math.comb(drawn + held, near)


def dhash(pictures) -> np.ndarray:
    """(N, 64) bool: whether brightness falls from each of 8 x 8 places to its right neighbour (the 'difference hash').

    Pictures whose hashes differ in few bits are nearly the same picture.
    """
    from PIL import Image

    small = [np.asarray(p.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=int) for p in pictures]
    pixels = np.stack(small)
    return (pixels[:, :, 1:] < pixels[:, :, :-1]).reshape(len(small), 64)
