"""The loop: resumed = unbroken, accumulation = a larger batch, and nothing lost when it can't go on."""

import dataclasses
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from naruto_lora import checkpoint, lora, models, train
from naruto_lora.recipe import RECIPES, Leg


def content(file):
    """Everything in a safetensors file; its header's order is left to chance by the format's writer."""
    with safe_open(file, "pt") as handle:
        metadata = json.loads(handle.metadata()["lora_adapter_metadata"])
    metadata["unet.target_modules"].sort()
    return metadata, {name: value.numpy().tobytes() for name, value in load_file(file).items()}


def same_adapter(one, two):
    return content(one / lora.FILE) == content(two / lora.FILE)


class Stop(Exception):
    """What a disconnection is here: raised from `show`."""


def stop_after(steps):
    def show(phase, done, total, **figures):
        if phase == "training" and done == steps:
            raise Stop

    return show


def numbers(parameters):
    return torch.cat([p.detach().flatten() for p in parameters])


def test_the_record_says_what_was_done(plan, trained, examples):
    record = trained.record
    assert record == json.loads((trained.folder / "run.json").read_text())
    assert record["step"] == 6 and len(record["losses"]) == 6 and all(np.isfinite(record["losses"]))
    assert list(record["holdout"]) == ["0", "6"]
    assert {len(losses) for losses in record["holdout"].values()} == {len(examples[1])}
    assert record["pictures"] == {"training": len(examples[0]), "holdout": len(examples[1])}
    assert record["adapter"] == str(trained.adapter) and trained.adapter.is_file()
    assert record["recipe"]["legs"][1] == {"until": 6, "lr": 1e-2, "schedule": "cosine"}
    assert record["holdout"]["6"] != record["holdout"]["0"]


@pytest.mark.parametrize("steps", [1, 3, 5])
def test_stopped_and_resumed_is_unbroken(plan, trained, cache_folder, tmp_path, steps):
    with pytest.raises(Stop):
        train.train(plan, tmp_path, cache_folder, stop_after(steps))
    assert not (tmp_path / lora.FILE).exists()
    (tmp_path / ".writing-4").mkdir(exist_ok=True)
    (tmp_path / ".writing-4" / "state.json").write_text("{")  # a write that was killed
    record = train.train(plan, tmp_path, cache_folder)
    assert same_adapter(tmp_path, trained.folder)
    assert record["losses"] == trained.record["losses"] and record["holdout"] == trained.record["holdout"]
    ours, theirs = (load_file(checkpoint.find(f)[-1] / "optimizer.safetensors") for f in (tmp_path, trained.folder))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_legs_added_later_are_as_if_there_from_the_start(plan, trained, cache_folder, tmp_path):
    first = train.train(plan.replace(name="first", legs=plan.legs[:1]), tmp_path, cache_folder)
    assert first["step"] == 4 and not same_adapter(tmp_path, trained.folder)
    seen = []
    record = train.train(plan, tmp_path, cache_folder, lambda phase, done, total, **_: seen.append((phase, done)))
    assert [done for phase, done in seen if phase == "training"] == [5, 6]
    assert same_adapter(tmp_path, trained.folder) and record["losses"] == trained.record["losses"]
    assert list(record["holdout"]) == ["0", "4", "6"]


def test_at_its_end_nothing_is_trained_again(plan, trained, cache_folder):
    before, seen = content(trained.adapter), []
    record = train.train(plan, trained.folder, cache_folder, lambda phase, *_, **__: seen.append(phase))
    assert "training" not in seen and content(trained.adapter) == before
    assert record["losses"] == trained.record["losses"]


@pytest.mark.parametrize("field, value", [("rank", 8), ("alpha", 4.0), ("seed", 1), ("batch", 6), ("holdout", 0.3)])
def test_a_changed_field_is_refused_by_its_name_and_both_values(plan, trained, cache_folder, field, value):
    with pytest.raises(ValueError) as caught:
        train.begin(plan.replace(**{field: value}), trained.folder, cache_folder)
    old = getattr(plan, field)
    assert f"was begun with {field} {old!r}, not {value!r}" in str(caught.value)


def test_changed_data_is_refused(plan, trained, cache_folder, tmp_path):
    shutil.copytree(plan.dataset, tmp_path / "data")
    same = plan.replace(dataset=str(tmp_path / "data"))
    assert train.begin(same, trained.folder, cache_folder).step == 6  # moved, but the same pictures
    lines = (tmp_path / "data" / "metadata.jsonl").read_text().splitlines()
    row = json.loads(lines[0])
    lines[0] = json.dumps(row | {"text": row["text"] + " indeed"})
    (tmp_path / "data" / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="begun on other pictures, captions or another base model"):
        train.begin(same, trained.folder, cache_folder)


def test_accumulation_is_one_larger_batch(plan, cache_folder, tmp_path):
    gradients, losses = [], []
    for batch, accumulation in ((6, 1), (3, 2), (1, 6), (4, 2)):
        run = train.begin(plan.replace(batch=batch, accumulation=accumulation), tmp_path, cache_folder)
        draw = train.step.draw(plan, 0, run.trained.shapes)
        losses.append(run._accumulate(draw).item())
        gradients.append(torch.cat([p.grad.flatten() for p in run.parameters]))
    for loss, gradient in zip(losses[1:], gradients[1:], strict=True):
        assert loss == pytest.approx(losses[0], rel=1e-5)
        assert (gradient - gradients[0]).norm() < 1e-4 * gradients[0].norm()


def test_a_short_last_batch_counts_by_its_own_size(plan, cache_folder, tmp_path):
    run = train.begin(plan, tmp_path, cache_folder)
    last = train.step.steps_per_epoch(len(run.trained), plan) - 1
    draw = train.step.draw(plan, last, run.trained.shapes)
    count = len(draw.indices)
    assert 0 < count < plan.pictures_per_step and count % plan.batch  # short, and so is its last micro-batch
    run._accumulate(draw)
    found = torch.cat([p.grad.flatten() for p in run.parameters])
    run.unet.zero_grad()
    inputs = run.trained.batch(draw.indices, draw.latent_noise, draw.dropped, draw.flipped, run.device)
    train.step.diffusion_loss(
        run.unet, **inputs, timesteps=draw.timesteps, noise=torch.stack(draw.noise), alphas_cumprod=run.alphas_cumprod
    ).mean().backward()
    expected = torch.cat([p.grad.flatten() for p in run.parameters])
    assert (found - expected).norm() < 1e-4 * expected.norm()


def test_the_optimizer_uses_the_recipes_learning_rate(plan, cache_folder, tmp_path):
    legs = RECIPES["naruto-1024"].legs
    run = train.begin(plan.replace(legs=legs), tmp_path, cache_folder)
    before = numbers(run.parameters[1::2])  # the B matrices: zeros, so AdamW's first step is the rate itself
    used = []
    run.optimizer.register_step_post_hook(lambda optimizer, *_: used.append(optimizer.param_groups[0]["lr"]))
    steps = (0, 299, 300, 449, 599, 600, 764)
    for run.step in steps:
        run.update()
        if run.step == 0:
            assert (numbers(run.parameters[1::2]) - before).abs().max().item() == pytest.approx(1e-4, rel=1e-3)
    assert used == [RECIPES["naruto-1024"].learning_rate(k) for k in steps]
    assert len(run.optimizer.param_groups) == 1


def test_a_rate_added_on_resume_is_taken(plan, cache_folder, tmp_path):
    """The stock script's saved scheduler kept the old rate."""
    train.train(plan.replace(legs=(Leg(2, 1e-3),)), tmp_path, cache_folder)
    run = train.begin(plan.replace(legs=(Leg(2, 1e-3), Leg(3, 7e-5))), tmp_path, cache_folder)
    run.update()
    assert run.optimizer.param_groups[0]["lr"] == 7e-5


def test_gradients_that_are_not_finite_stop_the_run_and_leave_the_checkpoint_whole(plan, cache_folder, tmp_path):
    with pytest.raises(Stop):
        train.train(plan, tmp_path, cache_folder, stop_after(3))
    run = train.begin(plan, tmp_path, cache_folder)
    key = run.trained.latents[0]
    nan = torch.full(run.trained.shapes[0], float("nan"))
    save_file(
        {f"{key}.mean": nan, f"{key}.std": torch.zeros_like(nan), f"{key}.time_ids": torch.zeros(6)},
        tmp_path / "bad.safetensors",
    )
    shards = run.trained.shards | {key: safe_open(tmp_path / "bad.safetensors", "pt")}
    run.trained = dataclasses.replace(run.trained, latents=(key,) * len(run.trained), shards=shards)
    weights = numbers(run.parameters)
    with pytest.raises(RuntimeError, match=r"the gradients of step 2 are not finite \(loss nan\)") as caught:
        run.to_the_end()
    assert "\n" not in str(caught.value) and torch.equal(numbers(run.parameters), weights)
    assert [path.name for path in checkpoint.find(tmp_path)] == ["checkpoint-2"]
    assert train.begin(plan, tmp_path, cache_folder).step == 2


def test_an_overflowing_update_is_tried_again_not_counted(plan, cache_folder, tmp_path):
    """What fp16 does on a GPU, by a loss scale that overflows fp32."""
    plain, scaled = (train.begin(plan, tmp_path / name, cache_folder) for name in ("plain", "scaled"))
    scaled.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    tried = []
    for run in (plain, scaled):
        for module in run.unet.modules():
            if hasattr(module, "lora_A"):
                module.scaling["default"] = 1e5  # large gradients; B is still zero, so nothing else changes
        run.optimizer.register_step_post_hook(lambda *_: tried.append(1))
        run.update()
    assert len(tried) == 2  # one optimizer step each
    assert 2.0**110 < scaled.scaler.get_scale() < 2.0**127
    torch.testing.assert_close(numbers(scaled.parameters), numbers(plain.parameters), rtol=1e-4, atol=1e-6)


def test_gradients_are_clipped(plan, cache_folder, tmp_path, monkeypatch):
    run = train.begin(plan, tmp_path, cache_folder)
    monkeypatch.setattr(train, "MAX_GRAD_NORM", 1e-3)
    _, norm = run.update()
    assert norm > 1e-3
    assert torch.cat([p.grad.flatten() for p in run.parameters]).norm().item() == pytest.approx(1e-3, rel=1e-2)


def test_recomputed_activations_give_the_same_gradients(plan, cache_folder, tmp_path):
    gradients, passes = [], []
    for recompute in (False, True):
        run = train.begin(plan, tmp_path, cache_folder)
        if recompute:
            run.unet.enable_gradient_checkpointing()
        calls = []
        block = run.unet.mid_block.attentions[0].transformer_blocks[0]
        block.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        run._accumulate(train.step.draw(plan, 0, run.trained.shapes))
        gradients.append(torch.cat([p.grad.flatten() for p in run.parameters]))
        passes.append(len(calls))
    assert passes == [plan.accumulation, 2 * plan.accumulation]
    assert torch.equal(*gradients)


def test_half_precision_takes_the_same_step(plan, base, encoded, cache_folder, tmp_path):
    """The path of a GPU, on the CPU: fp16 U-Net under autocast, fp32 LoRA, scaled loss."""
    whole = train.begin(plan, tmp_path, cache_folder)
    unet = models.load_unet(base, torch.float16, torch.device("cpu"))
    parameters = lora.inject(unet, plan.rank, plan.alpha, plan.seed)
    half = train.Run(
        plan.replace(precision="fp16"), tmp_path, unet, parameters, encoded, encoded.part(0, 0), torch.device("cpu")
    )
    (loss, norm), (half_loss, half_norm) = whole.update(), half.update()
    assert half.scaler.is_enabled() and {p.dtype for p in half.parameters} == {torch.float32}
    assert half_loss == pytest.approx(loss, rel=1e-2) and half_norm == pytest.approx(norm, rel=5e-2)
    ours, theirs = (torch.cat([p.grad.flatten() for p in run.parameters]) for run in (half, whole))
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0) > 0.99


def test_without_a_holdout_nothing_is_measured(plan, cache_folder, tmp_path):
    record = train.train(plan.replace(holdout=0.0, legs=(Leg(1, 1e-3),)), tmp_path, cache_folder)
    assert record["holdout"] == {} and record["pictures"] == {"training": 24, "holdout": 0}


def test_the_bar_is_shown_every_step(plan, trained, cache_folder, tmp_path):
    seen = []
    train.train(plan.replace(legs=(Leg(2, 1e-3),)), tmp_path, cache_folder, lambda *news, **f: seen.append((news, f)))
    steps = [(news, figures) for news, figures in seen if news[0] == "training"]
    assert [news for news, _ in steps] == [("training", 1, 2), ("training", 2, 2)]
    assert all(f["lr"] == 1e-3 and f["loss"] > 0 and f["grad_norm"] > 0 and f["peak_gib"] is None for _, f in steps)


def test_the_module_runs_as_a_command(plan, tmp_path):
    file = tmp_path / "plan.json"
    file.write_text(plan.replace(legs=(Leg(1, 1e-3),)).to_json())
    result = subprocess.run(
        [sys.executable, "-m", "naruto_lora.train", file, "--out", tmp_path / "run"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == str(tmp_path / "run" / lora.FILE)
    assert (tmp_path / "run" / lora.FILE).is_file()


def test_the_command_says_what_is_wrong_in_one_line(tmp_path, capsys):
    assert train.main(["naruto-1024", "--out", str(tmp_path)]) == 1
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("stopped: this recipe trains in fp16") and error.count("\n") == 1
