"""Figures: intervals that contain the truth as often as they should, and a judge's shares."""

import math
import sys
import types

import numpy as np
import pytest
import torch

from naruto_lora import models
from naruto_lora.measure import metrics, validation


def test_the_means_interval_contains_the_truth_at_about_its_rate():
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(150):
        figure = metrics.mean(rng.gamma(2.0, 1.0, 40))  # skewed, as losses are; its mean is 2
        held += figure.low <= 2 <= figure.high
        assert figure.low < figure.value < figure.high and figure.n == 40
    assert 0.87 <= held / 150 <= 0.99


@pytest.mark.parametrize("n", [8, 16])
def test_few_pictures_get_a_wide_enough_interval(n):
    rng = np.random.default_rng(3)
    figures = [metrics.mean(rng.normal(1, 1, n)) for _ in range(300)]
    assert 0.9 <= np.mean([f.low <= 1 <= f.high for f in figures]) <= 0.99
    sure = np.mean([metrics.mean(rng.normal(0, 1, n)).sure for _ in range(300)])
    assert sure <= 0.03  # 0.8% is expected of the stricter interval


@pytest.mark.parametrize("freedom, exact", [(1, 12.706), (2, 4.303), (3, 3.182), (7, 2.365), (35, 2.030)])
def test_students_quantile_agrees_with_tables(freedom, exact):
    assert metrics.student(freedom) == pytest.approx(exact, rel=0.01)


def test_for_many_values_the_means_interval_is_the_normals():
    values = np.random.default_rng(1).normal(5, 2, 2000)
    figure = metrics.mean(values)
    assert figure.value == pytest.approx(values.mean())
    assert (figure.high - figure.low) / 2 == pytest.approx(1.96 * values.std() / 2000**0.5, rel=0.08)
    assert metrics.mean(values) == figure  # the same at each call


@pytest.mark.parametrize("p, n", [(0.5, 20), (0.97, 60), (0.02, 200)])
def test_the_shares_interval_contains_the_truth_at_about_its_rate(p, n):
    held = total = 0.0
    for k in range(n + 1):  # every outcome, by its probability
        chance = math.comb(n, k) * p**k * (1 - p) ** (n - k)
        figure = metrics.share([1] * k + [0] * (n - k))
        held += chance * (figure.low <= 100 * p <= figure.high)
        total += chance
    assert total == pytest.approx(1) and 0.92 <= held <= 0.985


def test_shares_of_none_and_of_all():
    none, every = metrics.share([0] * 200), metrics.share(np.ones(200, dtype=bool))
    assert (none.value, none.low, every.value, every.high) == (0, 0, 100, 100)
    assert none.high == pytest.approx(100 * 1.96**2 / (200 + 1.96**2), rel=1e-3)  # Wilson's closed form at 0
    assert every.low == pytest.approx(100 - none.high)


def test_what_is_common_cancels_in_a_paired_gain():
    rng = np.random.default_rng(2)
    common, gain = rng.normal(0, 50, 30), rng.normal(-1, 0.1, 30)
    figure = metrics.paired(common, common + gain)
    assert figure.value == pytest.approx(gain.mean()) and -1.1 < figure.low < figure.high < -0.9
    unpaired = metrics.mean(common + gain)
    assert unpaired.high - unpaired.low > 100 * (figure.high - figure.low)
    with pytest.raises(ValueError):
        metrics.paired(common, gain[:-1])


def test_one_value_has_no_interval():
    with pytest.raises(ValueError, match="at least 2 pictures, not 1; draw or hold out more"):
        metrics.mean([3.0])


def test_a_figure_prints_value_interval_and_size():
    assert str(metrics.Figure(12.3456, 11.1, 13.9, 24)) == "12.3 [11.1, 13.9] (n = 24)"


def test_holdout_losses_are_those_of_training_by_adapter(pipe, encoded, base):
    few = encoded.part(0, 4)
    before, style, again = (metrics.holdout_losses(pipe, few, name) for name in ("base", "style", "base"))
    assert before.shape == (4,) and (again == before).all() and (style != before).all()
    unet, alphas = models.load_unet(base, torch.float32, torch.device("cpu")), models.load_alphas_cumprod(base)
    expected = validation.holdout_losses(unet, few, alphas, torch.device("cpu"), batch=3).mean(dim=1)
    np.testing.assert_allclose(before, expected.numpy(), rtol=1e-4)


@pytest.fixture
def judge(monkeypatch):
    module = types.ModuleType("a_judge")
    module.score = lambda pictures, prompts: {"attributes": [1.0, 0.5, 0.75], "style": [1, 0, 1]}
    monkeypatch.setitem(sys.modules, "a_judge", module)
    return "a_judge"


def test_a_judges_shares_become_percent(judge):
    figures = metrics.judged(judge, [], [])
    assert figures["attributes"].value == 75 and figures["style"].value == pytest.approx(200 / 3)
    assert figures["style"].n == 3


@pytest.mark.parametrize("name", ["no.such.judge", "json"])
def test_an_error_names_what_is_no_judge(name):
    with pytest.raises(ValueError, match=f"the judge '{name}' must be a module with score"):
        metrics.judged(name, [], [])
