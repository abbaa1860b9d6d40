"""The speed of this machine: tables whose figures fit together."""

import torch

from naruto_lora import recipe, tiny
from naruto_lora.memory import plan as plans
from naruto_lora.memory import speed


def test_precisions_has_the_measured_figures_and_the_ratio_to_fp32():
    (row,) = speed.precisions(64)
    assert row["precision"] == "fp32" and row["against fp32"] == "1 x"
    assert float(row["matrix product, TFLOP/s"]) > 0 and float(row["convolution, TFLOP/s"]) > 0


def test_a_recipe_s_minutes_follow_from_its_micro_step(base, monkeypatch):
    monkeypatch.setattr(speed, "_micro_step", lambda *_: 0.5)
    plan = recipe.load(tiny.HIGH).replace(base=base, batch=4, accumulation=3)
    (row,) = speed.steps([plan])
    assert (row["micro-batch"], row["ms a micro-batch"], row["s a step"]) == (4, "500", "1.5")
    assert float(row["minutes in total"]) == round(1.5 * plan.steps / 60)


def test_the_timed_steps_are_real_ones(base, monkeypatch):
    """Each micro-step has the recipe's shapes and reaches the LoRA; afterwards the U-Net is as before."""
    seen = []
    original = speed.make_engine

    def make(unet, parameters, rung):
        engine = original(unet, parameters, rung)
        accumulate = engine.accumulate

        def noted(inputs, seed):
            seen.append((tuple(inputs["latents"].shape), rung))
            losses = accumulate(inputs, seed)
            assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters)
            return losses

        engine.accumulate = noted
        return engine

    monkeypatch.setattr(speed, "make_engine", make)
    plans_ = [recipe.load(path).replace(base=base, batch=2) for path in (tiny.LOW, tiny.HIGH)]
    rows = speed.steps(plans_)
    assert [row["recipe"] for row in rows] == [plan.name for plan in plans_]
    assert {shape for shape, _ in seen} == {(2, 4, 8, 8), (2, 4, 16, 16)}
    assert len(seen) == 2 * (speed.WARM + speed.TIMED)
    assert all(rung == plans.here(plans_[0]).rung for _, rung in seen)


def test_random_inputs_fit_the_unet(base):
    unet = speed.models.load_unet(base, torch.float32, torch.device("cpu"))
    inputs = speed.random_inputs(unet, 2, 8, torch.device("cpu"))
    inputs["alphas_cumprod"] = speed.models.load_alphas_cumprod(base)
    assert speed.lean.step.diffusion_loss(unet, **inputs).shape == (2,)
