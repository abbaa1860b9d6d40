"""Recipes from any values and files: usable, or refused in one sentence."""

import dataclasses
import json
import math
import tempfile
from pathlib import Path

import pytest
from fuzzing import JSON, NUMBERS, PLAIN, TEXTS, fuzzed, refused, spoilt
from hypothesis import given
from hypothesis import strategies as st

from naruto_lora import recipe

FIELDS = [field.name for field in dataclasses.fields(recipe.Recipe)]
GOOD_LEG = st.fixed_dictionaries({"until": st.integers(1, 500), "lr": st.floats(1e-6, 1e-2)},
                                 optional={"schedule": st.sampled_from(recipe.SCHEDULES)})  # fmt: skip
LEG = st.one_of(
    GOOD_LEG, st.dictionaries(st.sampled_from(["until", "lr", "schedule", "rate"]), PLAIN, max_size=4), JSON
)
GOOD = {"name": "mine", "legs": [{"until": 3, "lr": 1e-4}]}
VALUES = st.builds(
    lambda good, odd: {**good, **odd},
    st.fixed_dictionaries({"name": st.sampled_from(["mine", "a b", "忍者"]), "legs": st.lists(GOOD_LEG, max_size=3)}),
    st.dictionaries(st.one_of(st.sampled_from(FIELDS), TEXTS), st.one_of(NUMBERS, JSON, st.lists(LEG, max_size=3)),
                    max_size=2),
)  # fmt: skip
TOML_NAMES = st.sampled_from([*FIELDS, "rang", '"a b"', "legs.x"])
TOML_VALUES = st.sampled_from([
    "true", "5", "-1", "1e400", "nan", "-inf", "'x'", '"\\ud83d"', "[[]]", "{}", "2026-11-25", "07:32:00", "0x10",
    "[" * 2000, "{x = " * 500, "1_000", '"""two\nlines"""', "9" * 5000,
])  # fmt: skip


def usable(plan: recipe.Recipe) -> None:
    """Fails unless `plan` can train: numbers in their bounds, names that a disk takes, and it survives its file."""
    for field, value in vars(plan).items():
        if field in recipe.BOUNDS:
            _, least, largest = recipe.BOUNDS[field]
            assert isinstance(value, (int, float)) and least <= value <= largest
    assert len(f"{plan.name}.safetensors.4194304.writing".encode()) < 256 and "/" not in plan.name
    assert all(isinstance(value, str) and value.encode() is not None for value in (plan.base, plan.vae, plan.dataset))
    rates = [plan.learning_rate(step) for step in {0, plan.steps // 2, plan.steps - 1}]
    assert all(0 < rate < math.inf for rate in rates)
    assert plan.describe(100).encode() and recipe.Recipe(**json.loads(plan.to_json())) == plan


@pytest.fixture(scope="module")
def place():
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@given(VALUES)
@fuzzed(0.15)
def test_any_values_through_every_door(place, values):
    said = set()
    file = place / "plan.json"
    file.write_text(json.dumps(values))
    names = {name: value for name, value in values.items() if name.isidentifier() and name != "source"}
    for door in (lambda: recipe.load(file), lambda: recipe.load("naruto-256", **names),
                 lambda: recipe.load("naruto-1024").replace(**names)):  # fmt: skip
        with refused() as caught:
            usable(door())
        said.add(str(caught))
    assert len(said) <= (1 if names == values else 3), said


@given(st.builds(lambda values, deep: values | {"base": deep}, st.just(GOOD), JSON), st.integers(1, 3000))
@fuzzed(0.03)
def test_nesting(place, values, depth):
    for text in (json.dumps(values | {"alpha": 0}).replace("0", "[" * depth + "]" * depth),
                 '{"name": ' * depth + "1" + "}" * depth):  # fmt: skip
        (place / "deep.json").write_text(text)
        with refused() as caught:
            recipe.load(place / "deep.json")
        assert caught


@given(st.one_of(st.binary(max_size=60), spoilt(recipe.RECIPES["naruto-256"].to_json().encode()),
                 JSON.map(lambda value: json.dumps(value).encode())))  # fmt: skip
@fuzzed(0.1)
def test_any_bytes_as_json(place, content):
    (place / "any.JSON").write_bytes(content)
    with refused():
        usable(recipe.load(place / "any.JSON"))


@given(st.one_of(
    st.binary(max_size=60), spoilt(b'name = "mine"\nrank = 8\n[[legs]]\nuntil = 10\nlr = 1e-3\n'),
    st.lists(st.tuples(TOML_NAMES, TOML_VALUES), max_size=3).map(
        lambda rows: "\n".join([f"{name} = {value}" for name, value in rows]
                               + ['name = "mine"', "[[legs]]", "until = 3", "lr = 1e-4"]).encode()),
))  # fmt: skip
@fuzzed(0.08)
def test_any_bytes_as_toml(place, content):
    (place / "any.toml").write_bytes(content)
    with refused():
        usable(recipe.load(place / "any.toml"))


@given(st.one_of(TEXTS, JSON, TEXTS.map(lambda text: f"{text}.json"), st.builds(Path, st.text("ab/~.", max_size=9))))
@fuzzed(0.04)
def test_any_name_of_a_recipe(name):
    with refused("recipe"):
        usable(recipe.load(name))


LEG_TEXT = st.one_of(TEXTS, st.builds(lambda *words: " ".join(map(str, words)), NUMBERS, NUMBERS,
                                      st.sampled_from(["", "cosine", "constant", "sine", "cosine 3"])))  # fmt: skip


@given(st.one_of(st.integers(0, 64), PLAIN), st.one_of(st.lists(LEG_TEXT, max_size=3).map(",".join), JSON),
       st.one_of(st.integers(0, 900), PLAIN), st.one_of(st.floats(0, 60), PLAIN))  # fmt: skip
@fuzzed(0.1)
def test_any_values_of_a_form(rank, legs, steps, max_minutes):
    whole = recipe.load("naruto-1024")
    with refused() as caught:
        plan = recipe.adjust(whole, rank, legs, steps, max_minutes)
        usable(plan)
        assert not rank or plan.alpha == whole.alpha * rank / whole.rank
    assert caught or not isinstance(rank, str) or not rank
