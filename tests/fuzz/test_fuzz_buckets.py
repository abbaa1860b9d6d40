"""Buckets: near the area, on the grid, the nearest aspect, and a wider picture never gets a narrower one."""

import math

from fuzzing import fuzzed
from hypothesis import given
from hypothesis import strategies as st

from naruto_lora.reading import picture

SIDES = st.one_of(st.integers(1, 70_000), st.sampled_from([1, 64, 512, 1023, 1024, 1025]))
RESOLUTIONS = st.one_of(st.integers(1, 512).map(lambda n: 8 * n), st.sampled_from([32, 64, 256, 512, 768, 1024]))


def aspect(size):
    return math.log(size[1] / size[0])


@given(st.tuples(SIDES, SIDES), RESOLUTIONS)
@fuzzed(0.12)
def test_the_bucket_of_any_picture(size, resolution):
    unit = max(8, resolution // 16 // 8 * 8)
    high, wide = chosen = picture.bucket(size, resolution)
    assert high % unit == wide % unit == 0 and min(chosen) > 0
    assert abs(high * wide - resolution**2) <= min(chosen) * unit / 2 + resolution % unit * resolution
    assert math.log(1 / 5) < aspect(chosen) < math.log(5)
    distance = abs(aspect(chosen) - aspect(size))
    assert all(distance <= abs(aspect(other) - aspect(size)) + 1e-9 for other in picture.buckets(resolution))


@given(st.tuples(SIDES, SIDES), st.tuples(SIDES, SIDES), RESOLUTIONS)
@fuzzed(0.06)
def test_a_wider_picture_never_gets_a_narrower_bucket(one, other, resolution):
    narrow, wide = sorted((one, other), key=aspect)
    first, second = (aspect(picture.bucket(size, resolution)) for size in (narrow, wide))
    assert first <= second or aspect(narrow) == aspect(wide)
    turned = picture.bucket(one[::-1], resolution)
    assert abs(abs(aspect(turned) + aspect(one)) - abs(aspect(picture.bucket(one, resolution)) - aspect(one))) < 1e-9


def test_sides_at_1024_px_are_multiples_of_64():
    assert all(side % 64 == 0 for size in picture.buckets(1024) for side in size)
