"""Cache keys: the same content and recipe give the same key, anything else another."""

import pytest
from fuzzing import fuzzed
from hypothesis import given
from hypothesis import strategies as st

from naruto_lora import cache, data, models, recipe


class Shard:
    """Stands for every shard: whatever is asked for is there."""

    def get_slice(self, key):
        return self

    def get_shape(self):
        return [4, 8, 8]


@pytest.fixture(scope="module", autouse=True)
def found():
    """Nothing is encoded: keys alone are made, of models that are called after their identity."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache.Shards, "find", lambda self, keys: dict.fromkeys(keys, Shard()))
        for name in ("_caption_fits", "_picture_fits"):
            patch.setattr(cache, name, lambda recipe: None)
        patch.setattr(models, "identity", lambda source: source)
        yield


PLAN = recipe.load("naruto-256", precision="fp32")
CHANGES = st.fixed_dictionaries({}, optional={
    "base": st.sampled_from(["aa", "ab", "a"]), "vae": st.sampled_from(["", "aa", "b"]),
    "resolution": st.sampled_from([8, 64, 640, 256]), "buckets": st.booleans(), "flip": st.booleans(),
    "precision": st.sampled_from(["fp32", "fp16"]), "rank": st.integers(1, 64), "seed": st.integers(0, 9),
    "name": st.sampled_from(["x", "y"]),
})  # fmt: skip
EXAMPLE = st.builds(data.Example, st.text(max_size=3), st.text(max_size=4), st.binary(max_size=4))


def keys(plan, example):
    """What decides an entry of the example, and its key: of the picture, the mirrored picture, the caption."""
    made = cache.encode([example], plan, "nowhere")
    vae = plan.vae or plan.base, plan.precision, plan.resolution, plan.buckets, example.source
    return {
        ("picture", *vae): made.latents[0], ("mirrored" if plan.flip else "picture", *vae): made.mirrored[0],
        ("caption", plan.base, plan.precision, example.caption): made.prompts[0],
    }  # fmt: skip


@given(CHANGES, EXAMPLE, CHANGES, EXAMPLE)
@fuzzed(0.08)
def test_equal_inputs_have_equal_keys_and_no_others(first, one, second, other):
    ours, theirs = keys(PLAN.replace(**first), one), keys(PLAN.replace(**second), other)
    for what, key in ours.items():
        assert all((what == that) == (key == theirs[that]) for that in theirs)
        assert len(key) == 32 and set(key) <= set("0123456789abcdef")
    assert len(set(ours.values())) == len(ours)


@given(st.lists(EXAMPLE, min_size=1, max_size=4), CHANGES, st.integers(0, 4))
@fuzzed(0.02)
def test_the_order_and_the_name_of_a_picture_do_not_matter(examples, changes, held):
    plan = PLAN.replace(**changes)
    made = cache.encode(examples, plan, "nowhere", held=min(held, len(examples)))
    back = cache.encode(examples[::-1], plan, "elsewhere")
    assert made.latents == back.latents[::-1] and made.prompts == back.prompts[::-1]
    flipped = [one != two for one, two in zip(made.latents, made.mirrored, strict=True)]
    assert flipped == [plan.flip and k < len(examples) - held for k in range(len(examples))]
