"""Recipes: their numbers, files and errors."""

import math
from pathlib import Path

import pytest

from naruto_lora import recipe
from naruto_lora.recipe import RECIPES, Leg, Recipe, load


def cosine(peak, done):
    return peak * (1 + math.cos(math.pi * done)) / 2


def test_learning_rate_of_the_1024_recipe_in_closed_form():
    rate = RECIPES["naruto-1024"].learning_rate
    assert rate(0) == rate(299) == 1e-4
    assert rate(1) == 1e-4
    assert rate(300) == 3e-5
    assert rate(301) == pytest.approx(cosine(3e-5, 1 / 300), rel=1e-12)
    assert rate(449) == pytest.approx(cosine(3e-5, 149 / 300), rel=1e-12)
    assert rate(599) == pytest.approx(cosine(3e-5, 299 / 300), rel=1e-12)
    assert rate(600) == 3e-5
    assert rate(601) == pytest.approx(cosine(3e-5, 1 / 165), rel=1e-12)
    assert rate(764) == pytest.approx(cosine(3e-5, 164 / 165), rel=1e-12)
    with pytest.raises(ValueError, match="step 765 is past the last leg"):
        rate(765)


def test_the_two_recipes_have_the_batch_sizes_and_steps_of_the_original():
    high, low = RECIPES["naruto-1024"], RECIPES["naruto-256"]
    assert (high.steps, high.batch, high.accumulation, high.pictures_per_step) == (765, 1, 8, 8)
    assert (low.steps, low.batch, low.accumulation, low.pictures_per_step) == (200, 12, 8, 96)
    text = high.describe(1221)
    assert "765 steps = 6,105 pictures, 5.0 epochs of 1,221" in text
    assert "0.0001 constant to 300, then 3e-05 cosine to 600" in text


def test_a_recipe_survives_its_file(tmp_path):
    plan = RECIPES["naruto-1024"].replace(alpha=7.5, seed=3)
    file = tmp_path / "plan.json"
    file.write_text(plan.to_json())
    assert load(file) == plan
    assert load(file, seed=4) == plan.replace(seed=4)
    toml = tmp_path / "plan.toml"
    toml.write_text('name = "mine"\nresolution = 512\n[[legs]]\nuntil = 10\nlr = 1e-3\nschedule = "cosine"\n')
    assert load(toml) == Recipe("mine", (Leg(10, 1e-3, "cosine"),), resolution=512)


def test_the_description_counts_the_short_last_step_of_each_epoch():
    plan = RECIPES["naruto-1024"]
    assert "765 steps = 6,120 pictures;" in plan.describe()
    assert "6,105 pictures, 5.0 epochs of 1,221" in plan.describe(1221)
    assert "200 steps = 4,000 pictures, 200.0 epochs of 20;" in RECIPES["naruto-256"].describe(20)
    assert plan.replace(expect="2 h on that").describe().endswith("to 765. 2 h on that")


def test_paths_and_the_home_folder_become_text(tmp_path):
    plan = RECIPES["naruto-1024"].replace(dataset=tmp_path, base="~/sdxl")
    assert plan.dataset == str(tmp_path) and plan.base == str(Path.home() / "sdxl")


def test_the_embedded_recipes_have_legs_like_the_real_ones():
    from naruto_lora.tiny import HIGH, LOW

    for stand_in, real in ((load(LOW), RECIPES["naruto-256"]), (load(HIGH), RECIPES["naruto-1024"])):
        assert [leg.schedule for leg in stand_in.legs] == [leg.schedule for leg in real.legs]
        shares = [[leg.until / recipe.steps for leg in recipe.legs] for recipe in (stand_in, real)]
        assert shares[0] == pytest.approx(shares[1], abs=0.01)
    low, high = load(LOW), load(HIGH)
    assert (low.resolution, high.resolution) == (32, 64)
    assert low.pictures_per_step > high.pictures_per_step and low.accumulation > 1


def test_steps_of_a_form_end_the_recipe_early_with_the_same_learning_rates():
    whole = recipe.load("naruto-1024")
    for steps, until in ((50, 50), (300, 300), (301, 600), (765, 765), (900, 765), (0, 765)):
        short = recipe.adjust(whole, steps=steps)
        assert short.steps == until
        assert [short.learning_rate(k) for k in range(until)] == [whole.learning_rate(k) for k in range(until)]
    assert recipe.adjust(whole) == whole
    larger = recipe.adjust(whole.replace(alpha=8.0), rank=64, max_minutes=3)
    assert (larger.rank, larger.alpha, larger.max_minutes) == (64, 32.0, 3)


def test_legs_as_they_are_written_in_a_form():
    legs = recipe.adjust(recipe.load("naruto-256"), legs="300 1e-4, 600 3e-5 cosine").legs
    assert legs == (recipe.Leg(300, 1e-4), recipe.Leg(600, 3e-5, "cosine"))
    for text, said in (("300", "the leg '300' must read"), ("a b", "the leg 'a b'"), ("9 1e-4 sine", "schedule 'sine'"),
                       ("9 1e-4, 5 1e-4", "in order"), ("9 1e-4 cosine 3", "must read")):
        with pytest.raises(ValueError, match=said):
            recipe.adjust(recipe.load("naruto-256"), legs=text)
