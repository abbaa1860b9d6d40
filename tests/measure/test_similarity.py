"""Distances between pictures where the truth is known: values by hand, simulations, and a drawn world."""

import math

import numpy as np
import pytest
from PIL import Image

from naruto_lora.measure import encoders, similarity
from naruto_lora.measure.metrics import mean
from naruto_lora.tiny import world

Q = math.exp(-0.01)  # the kernel of two unit vectors at right angles: exp(-2 / (2 x 10^2))
E1, E2 = [1.0, 0.0], [0.0, 1.0]


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("pictures, expected", [
    ([[E1], [E1], [E1]], 2000 * (1 - Q)),
    ([[E1], [E1], [E2]], 1000 * 2 / 3 * (1 - Q)),
    ([[E2], [E2], [E2]], 0),
    ([[E1, E2]] * 3, 1000 * ((1 + Q) / 2 + 1 - 2 * (1 + Q) / 2)),  # pairs of different prompts: half are alike
])
def test_cmmd_agrees_with_its_definition_by_hand(pictures, expected):
    assert similarity.cmmd(pictures, [E2] * 3).value == pytest.approx(expected, abs=1e-9)


def test_the_jackknife_leaves_out_each_prompt_and_each_real_picture():
    rng = np.random.default_rng(0)
    x, y = unit(rng.normal(size=(6, 2, 4))), unit(rng.normal(size=(7, 4)))
    left = [np.array([similarity.cmmd(np.delete(x, k, 0), y).value for k in range(6)]),
            np.array([similarity.cmmd(x, np.delete(y, k, 0)).value for k in range(7)])]
    figure = similarity.cmmd(x, y)
    error = math.sqrt(sum((len(v) - 1) * v.var() for v in left))
    assert (figure.high - figure.low) / 2 == pytest.approx(2.571 * error, rel=3e-3)  # t of 5 degrees of freedom
    again = unit(rng.normal(size=(6, 2, 4)))
    change = similarity.cmmd_change(x, again, y)
    assert change.value == pytest.approx(similarity.cmmd(again, y).value - figure.value)
    assert similarity.cmmd_change(x, x, y) == similarity.Figure(0, 0, 0, 6)


def pictures(rng, prompts, seeds, shift=0.0):
    """(P, S, 32) embeddings around one centre for each prompt, moved by `shift` in one direction."""
    x = 0.7 * rng.normal(size=(prompts, 1, 32)) + 0.7 * rng.normal(size=(prompts, seeds, 32))
    x[..., 0] += 3
    x[..., 1] += shift
    return unit(x)


def test_the_style_distances_interval_contains_the_truth_at_about_its_rate():
    rng = np.random.default_rng(1)
    truth = similarity.cmmd(pictures(rng, 1000, 1, 1.0), pictures(rng, 1000, 1)[:, 0]).value
    figures = [similarity.cmmd(pictures(rng, 10, 2, 1.0), pictures(rng, 36, 1)[:, 0]) for _ in range(200)]
    assert np.mean([f.low <= truth <= f.high for f in figures]) >= 0.93
    error = np.std([f.value for f in figures]) / math.sqrt(200)
    assert abs(np.mean([f.value for f in figures]) - truth) < 5 * error  # unbiased, though prompts have two seeds


def test_equal_models_are_within_noise_in_95_of_100_resamples():
    rng, alarms = np.random.default_rng(2), 0
    for _ in range(100):
        place = pictures(rng, 8, 1)
        before, after = (unit(place + 0.2 * rng.normal(size=(8, 2, 32))) for _ in range(2))
        figures = [
            similarity.cmmd_change(before, after, pictures(rng, 36, 1)[:, 0]),
            similarity.diversity_change(before, after),
            mean(rng.normal(size=8)),  # prompt fit, hold-out loss
        ]
        alarms += any(figure.sure for figure in figures)
    assert alarms <= 5


def test_the_unit_of_drift_is_another_seed():
    rng = np.random.default_rng(3)
    place = pictures(rng, 400, 1)
    base, other = (unit(place + 0.3 * rng.normal(size=(400, 2, 32)) / 6) for _ in range(2))
    assert similarity.drift(base, base).value == pytest.approx(0, abs=1e-9)
    assert similarity.drift(base, other).value == pytest.approx(1, abs=0.1)  # other seeds of the same model
    assert similarity.drift(base, pictures(rng, 400, 2)).value > 3
    with pytest.raises(ValueError, match="at least 2 seeds"):
        similarity.drift(base[:, :1], other[:, :1])
    with pytest.raises(ValueError, match="same picture for every seed"):
        similarity.drift(base[:, [0, 0]], other)


def test_diversity_by_hand():
    assert similarity.diversity([[E1, E2], [E1, E1]]).value == pytest.approx(0.5)
    assert similarity.diversity_change([[E1, E2]] * 3, [[E1, E1]] * 3).value == pytest.approx(-1)


def test_too_few_pictures_are_an_error():
    with pytest.raises(ValueError, match="at least 3 prompts and 3 real pictures, not 2"):
        similarity.cmmd([[E1], [E2]], [E1] * 3)
    with pytest.raises(ValueError, match="at least 3 real pictures, and one for each caption, not 2"):
        similarity.copying([[E1]], [E1, E2], [[E1]], [E1] * 3)


def test_dhash_by_hand():
    ramp = Image.linear_gradient("L")  # brightens downwards
    across = ramp.rotate(90)  # brightens to the right
    assert not similarity.dhash([ramp, across]).any() and similarity.dhash([across.rotate(180)]).all()
    assert similarity.dhash([across.resize((40, 72)).convert("RGB")]).shape == (1, 64)


def test_chance_of_the_smallest_being_all_drawn():
    assert similarity._chance(0, 5, 5) == 1 and similarity._chance(1, 5, 5) == 0.5
    assert similarity._chance(2, 2, 2) == pytest.approx(1 / 6)


@pytest.mark.parametrize("training", [8, 300])
def test_a_shared_caption_is_no_copying(training):
    rng, alarms = np.random.default_rng(4), 0

    def pairs(count):
        """(P, 2, D) drawn and (N, D) real ones; each picture is near to its caption's real one."""
        captions = rng.normal(size=(count, 1, 32))
        real, drawn = (unit(captions + 0.5 * rng.normal(size=(count, n, 32))) for n in (1, 2))
        return drawn[:8], real[:, 0]

    for _ in range(100):
        alarms += similarity.copying(*pairs(training), *pairs(40)).flagged
    assert alarms <= 3


# The drawn world: the truth about the 'generated' sets is known, since a program draws them too.
JUDGE = encoders.load("naruto_lora.tiny.judge")
ASKED = world.prompts(24, seed=3)


def drawings(people, styles, seed):
    rng = np.random.default_rng(seed)
    return [world.draw(p["attributes"], styles[k % len(styles)], rng, 64) for k, p in enumerate(people)]


def mixed(share, seed):
    """The asked prompts, the first `share` of them in the new style."""
    old = [world.ORDINARY[k % len(world.ORDINARY)] for k in range(24)]
    return drawings(ASKED, [world.STYLE if k < share * 24 else style for k, style in enumerate(old)], seed)


@pytest.fixture(scope="module")
def real():
    return drawings(world.prompts(40, seed=1), [world.STYLE], 1)


@pytest.fixture(scope="module")
def sets():
    """{share of the new style: (24, 2, D)}"""
    return {share: np.stack([JUDGE.embed(mixed(share, seed)) for seed in (10, 11)], axis=1)
            for share in (0, 0.25, 0.5, 0.75, 1)}


def test_style_distance_falls_as_the_style_arrives(sets, real):
    held = JUDGE.embed(real)
    distances = [similarity.cmmd(pictures, held).value for pictures in sets.values()]
    assert distances == sorted(distances, reverse=True)
    changes = [similarity.cmmd_change(sets[0], sets[share], held) for share in (0.25, 0.5, 1)]
    assert changes[-1].sure and changes[-1].value < changes[1].value < changes[0].value < 0


def test_shuffled_captions_cost_prompt_fit_and_not_style(sets, real):
    held = JUDGE.embed(real)
    texts, others = [p["text"] for p in ASKED], [p["text"] for p in ASKED[1:] + ASKED[:1]]
    right, wrong = (JUDGE.fit(drawings(ASKED, [world.STYLE], 10), words) for words in (texts, others))
    assert mean(wrong - right).sure and wrong.mean() < 60 < 95 < right.mean()
    shuffled = np.stack([JUDGE.embed(drawings(ASKED[1:] + ASKED[:1], [world.STYLE], seed)) for seed in (10, 11)], 1)
    assert not similarity.cmmd_change(sets[1], shuffled, held).sure


@pytest.fixture(scope="module")
def trained():
    return drawings(world.prompts(300, seed=2), [world.STYLE], 2)


@pytest.mark.parametrize("memorised, training, copyist", [(8, 8, True), (8, 300, True), (0, 8, False), (0, 300, False)])
def test_memorised_pictures_are_distinguished_from_new_ones(memorised, training, copyist, trained, real):
    captions, trained = world.prompts(300, seed=2)[: min(16, training)], trained[:training]
    rng, drawn = np.random.default_rng(5), drawings(captions, [world.STYLE], 77)
    for k in range(memorised):  # memorised: the training picture with a VAE's errors
        noisy = np.asarray(trained[k], dtype=float) + rng.normal(0, 12, (64, 64, 3))
        drawn[k] = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
    kinds = drawn, trained, drawings(world.prompts(40, seed=1)[:16], [world.STYLE], 78), real
    embedded, hashes = ([of(kind) for kind in kinds] for of in (JUDGE.embed, similarity.dhash))
    for parts in (embedded, hashes):
        parts[0], parts[2] = parts[0][:, None], parts[2][:, None]
    found = similarity.copying(*embedded, tuple(hashes))
    assert found.flagged == copyist and found.n == len(captions) == len(found.pairs)
    if copyist:
        assert {pair[:2] for pair in found.pairs[:8]} == {(k, k) for k in range(8)}
