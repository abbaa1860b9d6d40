"""The metrics on LoRAs with a known fault: too few steps, shuffled captions, only eight pictures."""

import json

import pytest

from naruto_lora import data, pipeline, recipe, train
from naruto_lora.measure import encoders, metrics, similarity, study
from naruto_lora.tiny import judge, world

pytestmark = pytest.mark.slow
PER_PROMPT, OPTIONS = 2, dict(steps=8, guidance_scale=2.0, resolution=64, batch=16)
STEPS = {"brief": 15, "long": 100, "shuffled": 100, "eight": 170}


def shuffle_captions(folder):
    """The data set in `folder`, each caption moved to another picture."""
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    texts = [row["text"] for row in rows]
    lines = [json.dumps(row | {"text": text}) + "\n" for row, text in zip(rows, texts[1:] + texts[:1], strict=True)]
    (folder / "metadata.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """{name: data set}: 200 pictures, the same with captions shuffled, and 8 pictures."""
    place = tmp_path_factory.mktemp("sets")
    many, shuffled, eight = (world.write_dataset(place / name, count, seed=5, size=64)
                             for name, count in (("many", 200), ("shuffled", 200), ("eight", 8)))
    return {"brief": many, "long": many, "shuffled": shuffle_captions(shuffled), "eight": eight}


@pytest.fixture(scope="module")
def drawn(base, sets, tmp_path_factory):
    """{model: {"new" | "own": pictures}}: from captions that no model saw, and from its first training captions."""
    place, prompts = tmp_path_factory.mktemp("truth"), [p["text"] for p in world.prompts(16, seed=8)]
    for name, steps in STEPS.items():
        plan = recipe.Recipe(
            name, (recipe.Leg(steps, 2e-3),), resolution=64, batch=8, accumulation=1, caption_dropout=0.1, holdout=0,
            precision="fp32", previews=0, measure_every=10_000, save_every=10_000, base=base, vae="",
            dataset=str(sets[name]))
        train.train(plan, place / name, place / "cache")
    pipe = pipeline.load(base, adapters={name: place / name for name in STEPS}, precision="fp32")
    found = {}
    for name in ("base", *STEPS):
        own = [example.caption for example in data.load(sets[name if name != "base" else "long"])[:8]]
        found[name] = {kind: study.draw(pipe, {"": name}, texts, PER_PROMPT, place / "pictures", **OPTIONS)[""]
                       for kind, texts in (("new", prompts), ("own", own))}
    return found


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The new captions' pictures in the style; no model was trained on them."""
    import numpy as np

    rng = np.random.default_rng(9)
    return [world.draw(p["attributes"], world.STYLE, rng, 64) for p in world.prompts(40, seed=8)]


ENCODER = encoders.load("naruto_lora.tiny.judge")


def embedded(pictures):
    return ENCODER.embed(pictures).reshape(-1, PER_PROMPT, 2048)


def test_more_steps_reduce_the_style_distance(drawn, real):
    held = ENCODER.embed(real)
    seen = {name: embedded(kinds["new"]) for name, kinds in drawn.items()}
    distance = {name: similarity.cmmd(seen[name], held).value for name in ("base", "brief", "long")}
    assert distance["base"] > distance["brief"] > distance["long"]
    assert similarity.cmmd_change(seen["base"], seen["long"], held).sure


def test_shuffled_captions_cost_prompt_fit_but_not_style(drawn, real):
    people = [person for person in world.prompts(16, seed=8) for _ in range(PER_PROMPT)]
    new, texts = {name: drawn[name]["new"] for name in drawn}, [person["text"] for person in people]
    fits = {name: ENCODER.fit(new[name], texts).reshape(16, PER_PROMPT).mean(1) for name in ("long", "shuffled")}
    lost = metrics.paired(fits["long"], fits["shuffled"])
    assert lost.sure and lost.value < -20
    styles = {name: judge.score(new[name], people)["style"].reshape(16, PER_PROMPT).mean(1) for name in new}
    changed, gained = (metrics.paired(styles[name], styles["shuffled"]) for name in ("long", "base"))
    assert gained.sure and gained.value > 0 and not (changed.sure and changed.value < 0)
    distance = {name: similarity.cmmd(embedded(new[name]), ENCODER.embed(real)).value for name in ("base", "shuffled")}
    assert distance["shuffled"] < distance["base"]


def copying(drawn, name, folder, real):
    examples = data.load(folder)
    trained = [data.crop(example.image(), 64)[0] for example in examples]
    kinds = drawn[name]["own"], trained, drawn[name]["new"], real
    pictures = [ENCODER.embed(kind) for kind in kinds]
    hashes = [similarity.dhash(kind) for kind in kinds]
    for parts in (pictures, hashes):
        parts[0], parts[2] = (part.reshape(-1, PER_PROMPT, part.shape[-1]) for part in (parts[0], parts[2]))
    return similarity.copying(*pictures, tuple(hashes))


def test_eight_pictures_are_memorised_and_two_hundred_are_not(drawn, sets, real):
    assert copying(drawn, "eight", sets["eight"], real).flagged
    assert not copying(drawn, "long", sets["long"], real).flagged
