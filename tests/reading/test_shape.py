"""Aspect ratios: what a crop cuts away, by arithmetic and by counting pixels; when buckets are chosen."""

import numpy as np
import pytest
from PIL import Image

from naruto_lora.reading import picture, shape


@pytest.mark.parametrize("size, target, share", [
    ((64, 64), (32, 32), 0.0), ((60, 80), (32, 32), 0.25), ((80, 60), (32, 32), 0.25),
    ((1, 3000), (64, 64), 2999 / 3000),
    ((60, 80), (48, 64), 0.0), ((60, 80), (64, 48), 1 - 9 / 16),
])  # fmt: skip
def test_what_is_lost_is_the_share_of_pixels_that_the_crop_leaves_out(size, target, share):
    assert shape.lost(size, target) == pytest.approx(share)


@pytest.mark.parametrize("size", [(120, 200), (200, 120), (150, 150)])
@pytest.mark.parametrize("target", [(64, 64), (48, 80)])
def test_the_crop_keeps_what_the_share_says(size, target):
    """Counts the rows and columns of a ramp that are still there after `picture.crop`."""
    ramp = np.zeros((*size, 3), np.float64)
    ramp[..., 0] = np.linspace(0, 255, size[0])[:, None]
    ramp[..., 1] = np.linspace(0, 255, size[1])
    cropped, _ = picture.crop(Image.fromarray(ramp.round().astype(np.uint8)), target)
    left = [np.ptp(np.asarray(cropped)[..., channel].astype(float)) / 255 for channel in (0, 1)]
    assert left[0] * left[1] == pytest.approx(1 - shape.lost(size, target), abs=0.04)


def test_buckets_are_chosen_where_squares_cut_away_much(plan):
    coarse, plan = plan, plan.replace(resolution=256)
    wide, square = [(60, 80)] * 3 + [(64, 64)], [(64, 64)] * 9 + [(60, 80)]
    chosen, said = shape.fit(plan, wide)
    assert chosen == plan.replace(buckets=True)
    assert "Squares would cut away 19%; `crop` = 'square'" in said and "on average 3%" in said
    assert shape.fit(coarse, wide)[0] == coarse  # at 32 px buckets cut away nearly as much
    chosen, said = shape.fit(plan, square)
    assert chosen == plan and said.endswith("on average 2% of it is cut away.")
    assert shape.fit(plan, wide, "square")[0] == plan
    assert shape.fit(plan, square, "buckets")[0].buckets
    assert shape.fit(plan.replace(buckets=True), square)[0].buckets  # the recipe's own choice
    assert not shape.fit(plan.replace(buckets=True), square, "square")[0].buckets
    with pytest.raises(ValueError, match="`crop` is 'round'; choose one of auto, square, buckets"):
        shape.fit(plan, wide, "round")


def test_a_bucket_never_cuts_away_more_than_the_square():
    for size in [(100, side) for side in range(100, 401, 7)]:
        assert shape.lost(size, picture.bucket(size, 1024)) <= shape.lost(size, (1024, 1024))
