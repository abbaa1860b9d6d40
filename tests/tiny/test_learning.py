"""Learning itself: the embedded recipe, whole, and what the judge reads in its pictures (some minutes)."""

import numpy as np
import pytest

from naruto_lora import pipeline, recipe, tiny, train
from naruto_lora.measure import metrics
from naruto_lora.show import report
from naruto_lora.tiny import judge, world

pytestmark = pytest.mark.slow
PROMPTS = 100  # for the base; the LoRA draws the first 60 of them


@pytest.fixture(scope="module")
def learnt(base, tmp_path_factory):
    """The high resolution recipe's record, and the judge's scores of base and LoRA."""
    out = tmp_path_factory.mktemp("learning")
    data = world.write_dataset(out / "data")
    plan = recipe.load(tiny.HIGH, base=base, dataset=str(data), measure_every=10_000, previews=0)  # first and last
    record = train.train(plan, out / plan.name)
    pipe = pipeline.load(base, adapters={"style": record["adapter"]})
    scores = {}
    for name, count in (("base", PROMPTS), ("style", 60)):
        prompts = world.prompts(PROMPTS, seed=1)[:count]
        pictures = pipeline.draw(
            pipe, [prompt["text"] for prompt in prompts], list(range(1000, 1000 + count)), name, steps=16,
            guidance_scale=2.0, resolution=plan.resolution, batch=20,
        )
        scores[name] = judge.score(pictures, prompts)
    return record, scores


def test_the_base_draws_what_is_asked_and_not_in_the_style(learnt):
    scores = learnt[1]["base"]
    assert 100 * scores["attributes"].mean() >= 97, scores["by_attribute"]
    assert 100 * scores["style"].mean() <= 2


def test_the_lora_draws_in_the_style(learnt):
    assert 100 * learnt[1]["style"]["style"].mean() >= 95


def test_the_lora_still_draws_what_is_asked(learnt):
    before, after = (100 * learnt[1][name]["attributes"][:60] for name in ("base", "style"))
    change = metrics.paired(before, after)
    assert change.value >= -3 - (change.high - change.low) / 2, (str(change), learnt[1]["style"]["by_attribute"])


def test_the_holdout_loss_at_least_halves(learnt):
    first, *_, last = (np.mean(losses, axis=1) for losses in learnt[0]["holdout"].values())
    assert last.mean() <= first.mean() / 2
    assert metrics.paired(first, last).high < 0


@pytest.mark.parametrize("pictures, holdout, memorised", [(40, 0.65, True), (333, 0.1, False)])
def test_overfitting_is_seen_on_a_dozen_pictures_and_not_on_three_hundred(
    base, tmp_path, pictures, holdout, memorised
):
    plan = recipe.Recipe(
        "long", (recipe.Leg(300, 3e-3),), resolution=32, batch=6, accumulation=1, holdout=holdout, precision="fp32",
        save_every=1000, measure_every=30, previews=0, base=base, vae="",
        dataset=str(world.write_dataset(tmp_path / "data", count=pictures, size=64)),
    )
    record = train.train(plan, tmp_path / "run")
    trained, means = record["pictures"]["training"], [np.mean(v) for v in record["holdout"].values()]
    said = report.overfitting(record)
    if memorised:
        assert trained == 12 and 30 <= record["best_step"] <= 150 and means[-1] > 1.05 * min(means)
        assert f"lowest at step {record['best_step']} and has risen" in said
        assert (tmp_path / "run" / f"checkpoint-{record['best_step']}").is_dir()
    else:
        assert trained > 290 and "No sign of over-fitting" in said
