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
NEIGHBOURS = 50  # training pictures that the nearest one is held against
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
    """How near generated pictures come to training pictures, by embedding and by perceptual hash."""

    n: int  # generated pictures
    near: int  # of them nearer to a training picture than any hold-out picture is, by embedding
    near_hash: int  # the same by hash
    chance: float  # the probability of as many by chance, the smaller of the two, doubled
    pairs: list[tuple[int, int, float, int]]  # (generated, training, relative distance, hash bits), nearest first

    @property
    def flagged(self) -> bool:
        return self.chance < CHANCE

    def __str__(self) -> str:
        return f"{self.near} and {self.near_hash} of {self.n} nearer than any hold-out (chance: {self.chance:.2g})"


def copying(generated, training, holdout, hashes: tuple | None = None) -> Copying:
    """Whether `generated` (N, D) come nearer to `training` (M, D) than pictures of the same kind, `holdout` (H, D).

    A distance counts in relation to the next nearest training pictures' (Carlini et al. 2023, arXiv 2301.13188),
    so that a model whose pictures are all much alike isn't taken for a copyist. `hashes` are the three sets'
    `dhash`es. Were the generated pictures as any others, the smallest distances would be spread over both by chance.
    """
    ratios, nearest = _relative(generated, training)
    held, _ = _relative(holdout, training)
    near, bits = int((ratios < held.min()).sum()), np.full(len(ratios), -1)
    chances, near_hash = [_chance(near, len(ratios), len(held))], 0
    if hashes:
        own, theirs, kept = hashes
        bits = _bits(own, theirs)[np.arange(len(own)), nearest]
        near_hash = int((_bits(own, theirs).min(1) < _bits(kept, theirs).min()).sum())
        chances.append(_chance(near_hash, len(own), len(kept)))
    order = np.argsort(ratios)
    pairs = [(int(k), int(nearest[k]), float(ratios[k]), int(bits[k])) for k in order]
    return Copying(len(ratios), near, near_hash, min(1.0, len(chances) * min(chances)), pairs)


def _relative(pictures, training) -> tuple[np.ndarray, np.ndarray]:
    """(N,) distance to the nearest training picture over the mean of the next ones', and (N,) its place."""
    pictures, training = np.asarray(pictures, float), np.asarray(training, float)
    if len(training) < 3:
        raise ValueError(f"copying shows against at least 3 training pictures, not {len(training)}")
    distances = np.sqrt(np.maximum(2 - 2 * pictures @ training.T, 0))
    ordered = np.sort(distances, axis=1)
    return ordered[:, 0] / ordered[:, 1 : NEIGHBOURS + 1].mean(axis=1), distances.argmin(axis=1)


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


def _bits(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(N, 64), (M, 64) -> (N, M) bits that differ."""
    return (a[:, None] != b[None]).sum(axis=2)
