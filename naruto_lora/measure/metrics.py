"""Figures with their sample size and 95% interval: hold-out loss, paired gain, and a judge's scores.

Those that compare pictures by their embeddings are in `similarity`.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass

import numpy as np

Z = 1.959964  # the normal distribution's 97.5% point
STRICT = 1.35  # times a 95% interval is a 99.2% one: with six figures of equal models, 5% of cases then show a change


@dataclass(frozen=True)
class Figure:
    """A value with its 95% interval and its sample size, in pictures or prompts."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}] (n = {self.n})"

    @property
    def sure(self) -> bool:
        """Whether its 99.2% interval excludes 0; stricter than 95%, since one comparison tests several figures."""
        low, high = (self.value + STRICT * (end - self.value) for end in (self.low, self.high))
        return low > 0 or high < 0


def mean(values) -> Figure:
    """The mean of `values` (N,), N >= 2, with the bootstrap's expanded percentile interval over pictures.

    It is expanded by the ratio of Student's t to the normal (Hesterberg, Am. Statistician 69, 2015, 371): for few
    pictures the plain interval is too narrow. Raises ValueError for fewer than 2 values.
    """
    values = np.asarray(values, dtype=float)
    n = len(values)
    if n < 2:
        raise ValueError(f"an interval needs at least 2 pictures, not {n}; draw or hold out more")
    tail = 50 * math.erfc(math.sqrt(n / (n - 1)) * student(n - 1) / math.sqrt(2))  # percent beyond each end
    resamples = np.random.default_rng(0).integers(n, size=(4000, n))
    low, high = np.percentile(values[resamples].mean(axis=1), (tail, 100 - tail))
    return Figure(float(values.mean()), float(low), float(high), n)


def student(freedom: int) -> float:
    """The 97.5% point of Student's t, within 1% from 3 degrees of freedom on (Abramowitz and Stegun 26.7.5)."""
    exact = {1: 12.706, 2: 4.303}
    terms = (Z**3 + Z) / 4, (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96, (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384
    return exact.get(freedom) or Z + sum(term / freedom**k for k, term in enumerate(terms, 1))


def share(hits) -> Figure:
    """The share of true `hits` (N,) in percent, with Wilson's interval (J. Am. Stat. Assoc. 22, 1927, 209)."""
    n, p = len(hits), float(np.mean(hits))
    centre = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    low, high = max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))  # rounding past both ends
    return Figure(100 * p, 100 * low, 100 * high, n)


def paired(before, after) -> Figure:
    """The mean of `after` - `before`, picture by picture: what both have in common cancels."""
    return mean(np.asarray(after, dtype=float) - np.asarray(before, dtype=float))


def holdout_losses(pipe, cache, adapter: str) -> np.ndarray:
    """Each hold-out picture's denoising loss (N,) with `adapter` active; it doesn't show how pictures look."""
    from .. import pipeline
    from . import validation

    pipeline.use_adapter(pipe, adapter)
    alphas_cumprod = pipe.scheduler.alphas_cumprod.to(pipe.device)
    return validation.holdout_losses(pipe.unet, cache, alphas_cumprod, pipe.device, batch=8).mean(dim=1).numpy()


def scores(judge: str, pictures: list, prompts: list[dict]) -> dict:
    """Each picture's scores by the judge, the module named `judge`, for prompts whose attributes are known.

    The module has `score(pictures, prompts) -> {"attributes": (N,) share that is right, "style": (N,) 0 or 1}`, and
    optionally "legible": {attribute: (N,) 0 or 1}; each prompt is {"text": ..., "attributes": {...}}. Raises
    ValueError for a module without `score`.
    """
    try:
        score = importlib.import_module(judge).score
    except (ImportError, AttributeError):
        raise ValueError(f"the judge '{judge}' must be a module with score(pictures, prompts)") from None
    return score(pictures, prompts)


def judged(judge: str, pictures: list, prompts: list[dict]) -> dict[str, Figure]:
    """Percent of right attributes and of pictures in the style, from `scores`."""
    found = scores(judge, pictures, prompts)
    return {"attributes": mean(100 * np.asarray(found["attributes"])), "style": share(found["style"])}
