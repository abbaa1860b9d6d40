"""Learning itself: the embedded recipe, whole, and what the judge reads in its pictures (some minutes)."""

import numpy as np
import pytest

from naruto_lora import metrics, pipeline, recipe, tiny, train
from naruto_lora.tiny import judge, world

pytestmark = pytest.mark.slow
PROMPTS = 100  # for the base; the LoRA draws the first 60 of them


@pytest.fixture(scope="module")
def learnt(base, tmp_path_factory):
    """The high resolution recipe's record, and the judge's scores of base and LoRA."""
    out = tmp_path_factory.mktemp("learning")
    data = world.write_dataset(out / "data")
    plan = recipe.load(tiny.HIGH, base=base, dataset=str(data))
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
    before, after = learnt[0]["holdout"].values()
    assert np.mean(after) <= np.mean(before) / 2
    assert metrics.paired(before, after).high < 0
