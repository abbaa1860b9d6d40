"""Aspect ratios: how much of the pictures a crop cuts away, and whether buckets fit them better than squares."""

from __future__ import annotations

import statistics

from . import picture

MUCH = 0.1  # of a picture's area, on average: a 4:3 photograph loses 0.25 of it to a square, a 3:2 one 0.33
CHOICES = ("auto", "square", "buckets")


def lost(size: tuple[int, int], target: tuple[int, int]) -> float:
    """The share of a picture's area that `picture.crop` cuts away; `size` and `target` are (height, width)."""
    wider = size[1] * target[0] / (size[0] * target[1])  # than the target
    return 1 - min(wider, 1 / wider)


def mean_lost(sizes: list[tuple[int, int]], resolution: int, buckets: bool) -> float:
    """The mean of `lost` over pictures of `sizes`, for squares of `resolution` px or for its buckets."""
    square = (resolution, resolution)
    return statistics.fmean(lost(size, picture.bucket(size, resolution) if buckets else square) for size in sizes)


def fit(recipe, sizes: list[tuple[int, int]], crop: str = "auto"):
    """(`recipe` with the crop that fits pictures of `sizes`, a sentence that says which and why).

    `crop` is one of CHOICES. "auto" chooses buckets where the recipe has them, or where squares would cut away
    MUCH and more than twice what buckets do. Raises ValueError for another word.
    """
    if crop not in CHOICES:
        raise ValueError(f"`crop` is {crop!r}; choose one of {', '.join(CHOICES)}")
    square, best = (mean_lost(sizes, recipe.resolution, buckets) for buckets in (False, True))
    buckets = crop == "buckets" or (crop == "auto" and (recipe.buckets or square > max(MUCH, 2 * best)))
    if not buckets:
        said = f"Each picture is cropped to its middle square: on average {square:.0%} of it is cut away."
        return recipe.replace(buckets=False), said
    return recipe.replace(buckets=True), (
        f"Pictures keep about their own shape, in buckets of one area: on average {best:.0%} of a picture is cut away. "
        f"Squares would cut away {square:.0%}; `crop` = 'square' trains on them."
    )
