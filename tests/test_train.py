"""The loop: resumed = unbroken, accumulation = a larger batch, and nothing lost when it can't go on."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from naruto_lora import checkpoint, data, files, lora, models, pipeline, step, train
from naruto_lora.recipe import RECIPES, Leg


def same_adapter(one, two):
    return (one / lora.FILE).read_bytes() == (two / lora.FILE).read_bytes()


class Stop(Exception):
    """What a disconnection is here: raised from `show`."""


def stop_after(steps):
    def show(phase, done, total, **figures):
        if phase == "training" and done == steps:
            raise Stop

    return show


class Watcher:
    """A display that remembers: what it was shown, and its notes. `act` is called with the step of each update."""

    def __init__(self, act=lambda step: None):
        self.seen, self.notes, self.act = [], [], act

    def __call__(self, phase, done, total, **figures):
        self.seen.append((phase, done, total, figures))
        if phase == "training":
            self.act(done)

    def note(self, text):
        self.notes.append(text)

    @property
    def steps(self):
        return [done for phase, done, *_ in self.seen if phase == "training"]


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
    """The stock script starts the epoch again, in another order."""
    with pytest.raises(Stop):
        train.train(plan, tmp_path, cache_folder, stop_after(steps))
    assert not (tmp_path / lora.FILE).exists()
    for name in (".writing-4", ".old-checkpoint-0"):  # a write that was killed, and a removal
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "state.json").write_text("{")
    record = train.train(plan, tmp_path, cache_folder)
    assert same_adapter(tmp_path, trained.folder)
    assert record["losses"] == trained.record["losses"] and record["holdout"] == trained.record["holdout"]
    assert record["best_step"] == trained.record["best_step"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in trained.folder.iterdir())
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
    before, seen = trained.adapter.read_bytes(), []
    record = train.train(plan, trained.folder, cache_folder, lambda phase, *_, **__: seen.append(phase))
    assert "training" not in seen and trained.adapter.read_bytes() == before
    assert record["losses"] == trained.record["losses"]


@pytest.mark.parametrize("field, value", [("rank", 8), ("alpha", 4.0), ("seed", 1), ("flip", True)])
def test_a_changed_field_is_refused_by_its_name_and_both_values(plan, trained, cache_folder, field, value):
    with pytest.raises(ValueError) as caught:
        train.begin(plan.replace(**{field: value}), trained.folder, cache_folder)
    old = getattr(plan, field)
    assert f"was begun with {field} {old!r}, not {value!r}" in str(caught.value)


def test_what_decides_nothing_may_change(plan, trained, cache_folder):
    free = dict(name="other", save_every=5, save_minutes=1, measure_every=3, previews=0, max_minutes=9, expect="much")
    more = (*plan.legs, Leg(8, 5e-3))
    assert train.begin(plan.replace(**free, legs=more), trained.folder, cache_folder).step == 6
    same = plan.replace(batch=2, accumulation=3)  # the same pictures a step, in other pieces: a matter of memory
    assert train.begin(same, trained.folder, cache_folder).step == 6
    with pytest.raises(ValueError, match=r"was begun with batch \* accumulation 6, not 12"):
        train.begin(plan.replace(batch=6), trained.folder, cache_folder)


def test_a_leg_that_was_trained_is_fixed_a_later_one_is_not(plan, trained, cache_folder, tmp_path):
    with pytest.raises(ValueError, match=r"legs whose learning rate in step 1 is 0.02, not 0.01: take that"):
        train.begin(plan.replace(legs=(Leg(4, 1e-2), plan.legs[1])), trained.folder, cache_folder)
    with pytest.raises(ValueError, match=r"legs whose learning rate in step 6 is 0.005, not 0.00853553391"):
        train.begin(plan.replace(legs=(plan.legs[0], Leg(8, 1e-2, "cosine"))), trained.folder, cache_folder)
    with pytest.raises(ValueError, match="is at step 6, past the 4"):
        train.begin(plan.replace(legs=plan.legs[:1]), trained.folder, cache_folder)
    with pytest.raises(Stop):
        train.train(plan, tmp_path, cache_folder, stop_after(5))  # at step 4: the second leg has not begun
    assert train.begin(plan.replace(legs=(plan.legs[0], Leg(9, 1e-3))), tmp_path, cache_folder).step == 4


def test_changed_data_is_refused(plan, trained, cache_folder, tmp_path):
    shutil.copytree(plan.dataset, tmp_path / "data")
    same = plan.replace(dataset=str(tmp_path / "data"))
    assert train.begin(same, trained.folder, cache_folder).step == 6  # moved, but the same pictures
    lines = (tmp_path / "data" / "metadata.jsonl").read_text().splitlines()
    row = json.loads(lines[-1])
    (tmp_path / "data" / "metadata.jsonl").write_text("\n".join([*lines[:-1], json.dumps(row | {"text": "other"})]))
    with pytest.raises(ValueError, match="was begun with dataset") as caught:
        train.begin(same, trained.folder, cache_folder)
    for named in (plan.dataset, same.dataset, "training pictures"):
        assert named in str(caught.value)


def test_a_changed_holdout_and_an_earlier_version_are_refused(plan, trained, examples, cache_folder, tmp_path):
    moved = plan.replace(dataset=str(shutil.copytree(plan.dataset, tmp_path / "data")))
    listing = tmp_path / "data" / "metadata.jsonl"
    listing.write_text(listing.read_text().replace(examples[1][0].caption, "other words"))
    with pytest.raises(ValueError, match="was begun with holdout '0.15 "):
        train.begin(moved, trained.folder, cache_folder)
    state = checkpoint.read_state(checkpoint.newest([trained.folder]))
    held = train.sources_of(plan, *examples)
    train.refuse_changes(plan, held, state, tmp_path)
    del state["recipe"]["flip"]  # a field that came later: then it had its default
    train.refuse_changes(plan, held, state, tmp_path)
    with pytest.raises(ValueError, match="was begun with flip False, not True"):
        train.refuse_changes(plan.replace(flip=True), held, state, tmp_path)
    del state["sources"]
    with pytest.raises(ValueError, match="begun by an earlier version"):
        train.refuse_changes(plan, held, state, tmp_path)


def test_another_base_is_refused(plan, trained, cache_folder, tmp_path):
    other = plan.replace(base=str(tmp_path / "base"))
    shutil.copytree(plan.base, other.base)
    assert train.begin(other, trained.folder, cache_folder).step == 6  # moved, but the same
    file = tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: value * 1.01 for name, value in load_file(file).items()}, file)
    with pytest.raises(ValueError, match="was begun with base"):
        train.begin(other, trained.folder, cache_folder)


def test_accumulation_is_one_larger_batch(plan, cache_folder, tmp_path):
    gradients, losses = [], []
    for batch, accumulation in ((6, 1), (3, 2), (1, 6), (4, 2)):
        run = train.begin(plan.replace(batch=batch, accumulation=accumulation), tmp_path, cache_folder)
        draw = train.step.draw(plan, 0, run.trained.shapes)
        losses.append(run._accumulate(draw).mean().item())
        gradients.append(torch.cat([p.grad.flatten() for p in run.parameters]))
    for loss, gradient in zip(losses[1:], gradients[1:], strict=True):
        assert loss == pytest.approx(losses[0], rel=1e-5)
        assert (gradient - gradients[0]).norm() < 1e-4 * gradients[0].norm()


def repeated(encoded, count):
    """A cache of `count` examples, the same ones over and over."""
    columns = {name: (getattr(encoded, name) * count)[:count] for name in
               ("names", "shapes", "latents", "mirrored", "prompts")}
    return dataclasses.replace(encoded, **columns)


@pytest.mark.parametrize("batch, accumulation", [(12, 8), (1, 8)])
def test_the_recipes_own_accumulation_is_one_batch(plan, encoded, cache_folder, tmp_path, batch, accumulation):
    sizes, found = ((batch, accumulation), (batch * accumulation, 1)), []
    for size, count in sizes:
        run = train.begin(plan.replace(batch=size, accumulation=count), tmp_path, cache_folder)
        run.trained = repeated(encoded, 100)
        draw = step.draw(run.recipe, 0, run.trained.shapes)
        assert len(draw.indices) == batch * accumulation
        losses = run._accumulate(draw)
        found.append((losses, torch.cat([p.grad.flatten() for p in run.parameters])))
    (losses, gradient), (whole_losses, whole) = found
    torch.testing.assert_close(losses, whole_losses, rtol=1e-4, atol=1e-6)
    assert (gradient - whole).norm() < 1e-4 * whole.norm()


def test_a_step_on_the_cache_is_that_on_fresh_encodings(plan, examples, pipe, cache_folder, tmp_path):
    run = train.begin(plan, tmp_path, cache_folder)
    draw = step.draw(plan, 0, run.trained.shapes)
    cached = run._accumulate(draw)
    gradient = torch.cat([p.grad.flatten() for p in run.parameters])
    rows = [examples[0][i] for i in draw.indices]
    embeds, _, pooled, _ = pipe.encode_prompt([row.caption for row in rows], do_classifier_free_guidance=False)
    crops = [data.crop(row.image(), plan.resolution) for row in rows]
    posterior = pipe.vae.encode(data.pixels([image for image, _ in crops])).latent_dist
    latents = posterior.mean + posterior.std * torch.stack(draw.latent_noise)
    kept = (~draw.dropped).float()
    run.unet.zero_grad()
    losses = step.diffusion_loss(
        run.unet, (latents * pipe.vae.config.scaling_factor).detach(), embeds * kept[:, None, None],
        pooled * kept[:, None], torch.tensor([ids for _, ids in crops], dtype=torch.float32), draw.timesteps,
        torch.stack(draw.noise), run.alphas_cumprod,
    )
    losses.mean().backward()
    fresh = torch.cat([p.grad.flatten() for p in run.parameters])
    torch.testing.assert_close(cached, losses.detach(), rtol=1e-3, atol=1e-5)
    assert (fresh - gradient).norm() < 1e-3 * gradient.norm()


def test_a_short_last_batch_counts_by_its_own_size(plan, cache_folder, tmp_path):
    run = train.begin(plan, tmp_path, cache_folder)
    last = train.step.steps_per_epoch(len(run.trained), plan) - 1
    draw = train.step.draw(plan, last, run.trained.shapes)
    count = len(draw.indices)
    assert 0 < count < plan.pictures_per_step and count % plan.batch  # short, and so is its last micro-batch
    run._accumulate(draw)
    found = torch.cat([p.grad.flatten() for p in run.parameters])
    run.unet.zero_grad()
    train.step.diffusion_loss(run.unet, **run._inputs(draw, list(range(count)))).mean().backward()
    expected = torch.cat([p.grad.flatten() for p in run.parameters])
    assert (found - expected).norm() < 1e-4 * expected.norm()


def test_the_optimizer_uses_the_recipes_learning_rate(plan, cache_folder, tmp_path):
    """The stock script stretches its cosine by the accumulation."""
    legs = RECIPES["naruto-1024"].legs
    run = train.begin(plan.replace(legs=legs), tmp_path, cache_folder)
    before = numbers(run.parameters[1::2])  # the B matrices: zeros, so AdamW's first step is the rate itself
    used = []
    run.optimizer.register_step_post_hook(lambda optimizer, *_: used.append(optimizer.param_groups[0]["lr"]))
    steps = (0, 1, 299, 300, 301, 449, 450, 599, 600, 601, 764)
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


def test_a_loss_that_is_not_finite_stops_the_run_names_its_picture_and_keeps_what_is_trained(
    plan, trained, cache_folder, tmp_path, monkeypatch
):
    with pytest.raises(Stop):
        train.train(plan.replace(save_every=3), tmp_path, cache_folder, stop_after(4))
    run = train.begin(plan.replace(save_every=9), tmp_path, cache_folder)
    draw, real, calls = step.draw(plan, 4, run.trained.shapes), step.diffusion_loss, []

    def poisoned(*arguments, **inputs):
        calls.append(1)
        losses = real(*arguments, **inputs)
        return losses * torch.tensor([1.0, 1.0, float("nan")]) if len(calls) == 3 else losses

    monkeypatch.setattr(step, "diffusion_loss", poisoned)
    with pytest.raises(RuntimeError) as caught:
        run.to_the_end()
    name, timestep = run.trained.names[draw.indices[5]], draw.timesteps[5]
    assert str(caught.value).startswith(f"step 5: the loss is not finite for '{name}' (timestep {timestep}); the run")
    assert checkpoint.newest([tmp_path]).name == "checkpoint-4"  # all that was trained before it
    monkeypatch.undo()
    train.train(plan, tmp_path, cache_folder)
    assert same_adapter(tmp_path, trained.folder)


def test_gradients_that_stay_infinite_stop_the_run_and_change_nothing(plan, cache_folder, tmp_path):
    run = train.begin(plan, tmp_path, cache_folder)
    run.parameters[1].register_hook(lambda gradient: gradient * float("inf"))
    run.scaler = torch.amp.GradScaler("cpu")
    before, tried = numbers(run.parameters), []
    run.unet.register_forward_hook(lambda *_: tried.append(1))
    draw = train.step.draw(plan, 0, run.trained.shapes)
    with pytest.raises(RuntimeError, match="step 1: the gradients are not finite for .* and 2 more; ") as caught:
        run.update()
    for k in range(4):
        assert f"'{run.trained.names[draw.indices[k]]}' (timestep {draw.timesteps[k]})" in str(caught.value)
    assert len(tried) == train.RETRIES * plan.accumulation and torch.equal(numbers(run.parameters), before)
    assert run.scaler.get_scale() == 2.0**16  # not the last try's, with which a resumed run would underflow


def test_half_changed_weights_are_not_kept(plan, trained, cache_folder, tmp_path, monkeypatch):
    """8-bit Adam takes its memory in its first step, layer by layer."""
    run = train.begin(plan, tmp_path, cache_folder)
    real = run.optimizer.step

    def half(*_):
        if run.step == 3:
            run.parameters[0].data.zero_()
            raise torch.OutOfMemoryError("CUDA out of memory")
        real()

    monkeypatch.setattr(run.optimizer, "step", half)
    with pytest.raises(torch.OutOfMemoryError):
        run.to_the_end()
    assert checkpoint.newest([tmp_path]).name == "checkpoint-2"
    train.train(plan, tmp_path, cache_folder)
    assert same_adapter(tmp_path, trained.folder)


def test_an_overflowing_update_is_tried_again_not_counted(plan, cache_folder, tmp_path):
    """What fp16 does on a GPU, by a loss scale that overflows fp32; the stock script counts such a step."""
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
    assert record["holdout"] == {} and record["best_step"] is None
    assert record["pictures"] == {"training": 24, "holdout": 0}


def test_the_bar_is_shown_every_step(plan, cache_folder, tmp_path):
    watcher = Watcher()
    train.train(plan.replace(legs=(Leg(2, 1e-3),)), tmp_path, cache_folder, watcher)
    steps = [(done, total, figures) for phase, done, total, figures in watcher.seen if phase == "training"]
    assert [(done, total) for done, total, _ in steps] == [(1, 2), (2, 2)]
    for _, _, f in steps:
        assert f["lr"] == 1e-3 and f["loss"] > 0 and f["grad_norm"] > 0 and f["peak_gib"] is None
        assert f["images_per_second"] > 0 and f["left"] is None  # too early to tell


@pytest.mark.parametrize("number, raised", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_an_interrupt_saves_first_and_the_run_goes_on_bit_for_bit(
    plan, trained, cache_folder, tmp_path, number, raised
):
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    watcher = Watcher(lambda step: signal.raise_signal(number) if step == 3 else None)
    with pytest.raises(raised):
        train.train(plan, tmp_path, cache_folder, watcher)
    assert checkpoint.newest([tmp_path]).name == "checkpoint-3" and watcher.steps == [1, 2, 3]
    assert f"interrupted at step 3 of 6, kept in '{tmp_path / 'checkpoint-3'}': run it again" in watcher.notes[-1]
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    again = Watcher()
    train.train(plan, tmp_path, cache_folder, again)
    assert again.steps == [4, 5, 6] and same_adapter(tmp_path, trained.folder)
    assert again.notes[0] == f"goes on from {tmp_path / 'checkpoint-3'}, at step 3 of 6"


def test_an_interrupt_amid_a_step_leaves_that_step_out(plan, trained, cache_folder, tmp_path, monkeypatch):
    real, calls = step.diffusion_loss, []

    def interrupting(*arguments, **inputs):
        calls.append(1)
        if len(calls) == 5:  # step 2's first micro-batch
            signal.raise_signal(signal.SIGINT)
        return real(*arguments, **inputs)

    monkeypatch.setattr(step, "diffusion_loss", interrupting)
    with pytest.raises(KeyboardInterrupt):
        run = train.begin(plan, tmp_path, cache_folder)
        run.record["holdout"]["0"] = trained.record["holdout"]["0"]
        run.to_the_end()
    assert len(calls) == 5 and checkpoint.newest([tmp_path]).name == "checkpoint-2"
    monkeypatch.undo()
    train.train(plan, tmp_path, cache_folder)
    assert same_adapter(tmp_path, trained.folder)


def test_measuring_does_not_make_an_interrupt_wait(plan, cache_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(step, "holdout_losses", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    run = train.begin(plan, tmp_path, cache_folder)
    with pytest.raises(KeyboardInterrupt):
        run.to_the_end()
    assert run.record["holdout"] == {} and run.step == 0


def test_the_budget_stops_the_run_cleanly(plan, trained, cache_folder, tmp_path, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(train.time, "time", lambda: clock[0])
    short = plan.replace(max_minutes=2)
    watcher = Watcher(lambda step: clock.__setitem__(0, clock[0] + 50))  # seconds a step
    record = train.train(short, tmp_path, cache_folder, watcher)
    assert record["step"] == 3 and (tmp_path / lora.FILE).is_file()  # 150 s: what is there is given
    assert watcher.notes[-1].startswith("stopped by max_minutes = 2 at step 3 of 6, kept in")
    assert watcher.notes[-1].endswith("run it again to go on")
    monkeypatch.undo()
    assert train.train(short, tmp_path, cache_folder)["step"] == 6  # a budget is a session's
    assert same_adapter(tmp_path, trained.folder)


def test_a_budget_that_loading_eats_still_gives_a_step_a_session(plan, cache_folder, tmp_path):
    short = plan.replace(max_minutes=1e-6)
    assert [train.train(short, tmp_path, cache_folder)["step"] for _ in range(2)] == [1, 2]


def test_a_checkpoint_also_comes_by_the_clock(plan, cache_folder, tmp_path, monkeypatch):
    clock, saved = [1000.0], []
    monkeypatch.setattr(train.time, "time", lambda: clock[0])
    real = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda folder, k, *rest: saved.append(k) or real(folder, k, *rest))
    rare = plan.replace(save_every=100, save_minutes=1.5)
    train.train(rare, tmp_path, cache_folder, Watcher(lambda step: clock.__setitem__(0, clock[0] + 50)))
    assert saved == [2, 4, 6]


def previews(step):
    return [f"previews/step-{step:06d}-{n}.jpg" for n in (0, 1)]


def test_the_mirror_alone_is_enough(plan, trained, cache_folder, tmp_path):
    out, mirror = tmp_path / "local" / "run", tmp_path / "drive" / "run"
    mirror.parent.mkdir()
    with pytest.raises(Stop):
        train.train(plan, out, cache_folder, stop_after(5), mirror)
    shutil.rmtree(out.parent)  # the machine is gone
    watcher = Watcher()
    record = train.train(plan, out, cache_folder, watcher, mirror)
    assert watcher.steps == [5, 6] and watcher.notes[0].startswith(f"goes on from {mirror / 'checkpoint-4'}, at step 4")
    assert same_adapter(out, trained.folder) and record["losses"] == trained.record["losses"]
    for name in (lora.FILE, f"{plan.name}.safetensors", "run.json", *previews(0), *previews(6)):
        assert (mirror / name).read_bytes() == (out / name).read_bytes(), name
    assert checkpoint.newest([mirror]).name == "checkpoint-6"


def test_a_mirror_that_comes_late_catches_up_with_the_best_one_too(plan, cache_folder, tmp_path, monkeypatch):
    means = iter((1.0, 0.5, 0.7, 0.8, 0.9, 0.6))
    monkeypatch.setattr(step, "holdout_losses", lambda *_, **__: torch.full((3, 4), next(means)))
    long = plan.replace(legs=(Leg(5, 1e-3),), measure_every=1, save_every=1, previews=0)
    train.train(long, tmp_path / "run", cache_folder)
    train.train(long, tmp_path / "run", cache_folder, mirror=tmp_path / "mirror")
    assert [path.name for path in checkpoint.find(tmp_path / "mirror")] == ["checkpoint-1", "checkpoint-5"]
    assert all(checkpoint.problem(path) is None for path in checkpoint.find(tmp_path / "mirror"))


def test_a_mirror_that_fails_while_it_is_read_gives_way_to_what_is_here(plan, cache_folder, tmp_path, monkeypatch):
    out, mirror = tmp_path / "run", tmp_path / "mirror"
    with pytest.raises(Stop):
        train.train(plan, out, cache_folder, stop_after(5), mirror)
    shutil.rmtree(out / "checkpoint-4")
    monkeypatch.setattr(checkpoint, "fetch", lambda *_: (_ for _ in ()).throw(OSError(107, "not connected")))
    watcher = Watcher()
    assert train.begin(plan, out, cache_folder, watcher, mirror).step == 2
    assert f"{mirror / 'checkpoint-4'} can't be copied (not connected)" in watcher.notes


def test_an_end_that_cant_be_written_says_where_the_weights_are(plan, cache_folder, tmp_path, monkeypatch):
    def full(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    run = train.begin(plan.replace(legs=(Leg(1, 1e-3),), previews=0), tmp_path, cache_folder)
    run.to_the_end()
    monkeypatch.setattr(lora, "save_kohya", full)
    with pytest.raises(OSError, match="No space left on device.*: make room; its weights are kept in") as caught:
        run.finish()
    assert str(tmp_path / "checkpoint-1") in str(caught.value) and not (tmp_path / lora.FILE).exists()


def test_the_newer_of_both_places_is_taken(plan, trained, cache_folder, tmp_path):
    out, mirror = tmp_path / "run", tmp_path / "mirror"
    with pytest.raises(Stop):
        train.train(plan, out, cache_folder, stop_after(5), mirror)
    shutil.rmtree(mirror / "checkpoint-4")
    assert train.begin(plan, out, cache_folder, mirror=mirror).step == 4
    shutil.rmtree(mirror / "checkpoint-4")  # it had caught up
    (out / "checkpoint-4" / "state.json").write_text("{}")
    watcher = Watcher()
    run = train.begin(plan, out, cache_folder, watcher, mirror)
    assert run.step == 2 and watcher.notes == [
        f"{out / 'checkpoint-4'} is passed over: state.json damaged",
        f"goes on from {out / 'checkpoint-2'}, at step 2 of 6",
    ]
    run.to_the_end(watcher)
    run.finish()
    assert same_adapter(out, trained.folder) and checkpoint.newest([mirror]).name == "checkpoint-6"


def test_a_mirror_that_is_gone_or_full_is_told_once_and_stops_nothing(
    plan, trained, cache_folder, tmp_path, monkeypatch
):
    watcher, nowhere = Watcher(), tmp_path / "not" / "mounted"
    train.train(plan, tmp_path / "one", cache_folder, watcher, nowhere)
    assert same_adapter(tmp_path / "one", trained.folder) and not nowhere.parent.exists()
    told = [text for text in watcher.notes if str(nowhere) in text]
    assert "can't be used (No such file or directory)" in told[0] and len(told) == 2 and "the run goes on" in told[1]

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "copy_whole", full)
    watcher, mirror = Watcher(), tmp_path / "mirror"
    train.train(plan, tmp_path / "two", cache_folder, watcher, mirror)
    assert same_adapter(tmp_path / "two", trained.folder) and not checkpoint.find(mirror)
    assert [t for t in watcher.notes if "no copy" in t] == [
        f"no copy of the cache is kept in '{mirror.parent / 'cache'}' (No space left on device); the run goes on",
        f"no copy in the mirror '{mirror}' (No space left on device); the run goes on",
    ]


def test_a_full_disk_stops_the_run_with_a_sentence_and_what_was_kept(
    plan, trained, cache_folder, tmp_path, monkeypatch
):
    real = checkpoint.save

    def full(folder, k, *rest):
        if k > 4:
            raise OSError("No space left on device")
        return real(folder, k, *rest)

    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(OSError, match=r"checkpoint-6 can't be written to '.*' \(No space left on device\)") as caught:
        train.train(plan, tmp_path, cache_folder)
    assert "the newest there is of step 4: make room and run it again" in str(caught.value)
    assert [checkpoint.step_of(path) for path in checkpoint.find(tmp_path)] == [4]  # the older made room, in vain
    monkeypatch.undo()
    train.train(plan, tmp_path, cache_folder)
    assert same_adapter(tmp_path, trained.folder)


def test_the_best_step_is_marked_and_its_checkpoint_kept(plan, cache_folder, tmp_path, monkeypatch):
    means = iter((1.0, 0.9, 0.5, 0.7, 0.6, 0.8, 0.9))
    monkeypatch.setattr(step, "holdout_losses", lambda *_, **__: torch.full((3, 4), next(means)))
    long = plan.replace(legs=(Leg(12, 1e-3),), measure_every=2, save_every=1, previews=0)
    record = train.train(long, tmp_path, cache_folder)
    assert list(record["holdout"]) == ["0", "2", "4", "6", "8", "10", "12"] and record["best_step"] == 4
    assert [checkpoint.step_of(path) for path in checkpoint.find(tmp_path)] == [4, 10, 11, 12]
    assert checkpoint.read_state(tmp_path / "checkpoint-12")["record"]["best_step"] == 4


def test_previews_are_drawn_as_the_pipeline_draws(plan, trained, examples):
    pipe = pipeline.load(plan.base, adapters={"style": trained.folder})
    look = dict(steps=20, guidance_scale=4.0, resolution=plan.resolution)
    base, style = (np.asarray(pipeline.draw(pipe, [examples[1][1].caption], 1, a, **look)[0], float)
                   for a in ("base", "style"))
    for number, same, other in ((0, base, style), (6, style, base)):
        drawn = Image.open(trained.folder / "previews" / f"step-{number:06d}-1.jpg")
        assert drawn.size == (plan.resolution, plan.resolution)
        assert np.abs(drawn - same).mean() < 10 < 20 < np.abs(drawn - other).mean()  # JPEG's loss, another picture
    names = sorted(path.name for path in (trained.folder / "previews").iterdir())
    assert names == [f"step-{k:06d}-{n}.jpg" for k in (0, 6) for n in (0, 1)]


def test_previews_that_fail_stop_no_training(plan, trained, cache_folder, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(pipeline, "preview", fail)
    watcher = Watcher()
    train.train(plan, tmp_path, cache_folder, watcher)
    assert same_adapter(tmp_path, trained.folder)
    told = "no previews (OutOfMemoryError: CUDA out of memory); the run goes on"
    assert [text for text in watcher.notes if "previews" in text] == [told]


def test_the_end_loads_no_second_model(plan, cache_folder, tmp_path, monkeypatch):
    """The stock script loads a whole pipeline there, and can run out of memory after hours."""
    run = train.begin(plan, tmp_path, cache_folder)

    def refuse(*_, **__):
        raise MemoryError

    for name in ("_load", "load_unet", "load_vae", "load_text_encoders"):
        monkeypatch.setattr(models, name, refuse)
    monkeypatch.setattr(run, "_preview", lambda show: None)
    run.to_the_end()
    assert run.finish()["step"] == 6 and (tmp_path / lora.FILE).is_file()


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


def test_a_full_disk_spares_the_newest_usable_checkpoint(plan, cache_folder, tmp_path, monkeypatch):
    with pytest.raises(Stop):
        train.train(plan, tmp_path, cache_folder, stop_after(3))
    (tmp_path / "checkpoint-3").mkdir()  # damaged, passed over, and then trained past

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(OSError, match="the newest there is of step 2"):
        train.train(plan, tmp_path, cache_folder)
    assert checkpoint.newest([tmp_path]) == tmp_path / "checkpoint-2"


@pytest.mark.parametrize("at", [4, 6])
def test_a_measurement_that_was_interrupted_is_made_on_resuming(
    plan, cache_folder, trained, tmp_path, monkeypatch, at
):
    plan, real, calls = plan.replace(measure_every=2, previews=0), step.holdout_losses, []
    whole = train.train(plan, tmp_path / "whole", cache_folder)

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 1 + at // 2:
            signal.raise_signal(signal.SIGINT)
        return real(*arguments, **options)

    monkeypatch.setattr(step, "holdout_losses", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.train(plan, tmp_path / "cut", cache_folder)
    assert str(at) not in checkpoint.read_state(tmp_path / "cut" / f"checkpoint-{at}")["record"]["holdout"]
    monkeypatch.undo()
    record = train.train(plan, tmp_path / "cut", cache_folder)
    assert record["holdout"] == whole["holdout"] and record["best_step"] == whole["best_step"]


def test_a_mirror_of_another_run_is_refused_even_where_it_is_older(plan, cache_folder, tmp_path):
    out, mirror = tmp_path / "run", tmp_path / "mirror"
    train.train(plan.replace(legs=(Leg(2, 2e-2),), seed=7), mirror, cache_folder)
    with pytest.raises(Stop):
        train.train(plan, out, cache_folder, stop_after(5))
    with pytest.raises(ValueError, match="was begun with seed 7, not 0") as caught:
        train.begin(plan, out, cache_folder, mirror=mirror)
    assert str(mirror) in str(caught.value)


def test_what_a_killed_end_left_is_not_taken(plan, cache_folder, tmp_path):
    run = train.begin(plan, tmp_path, cache_folder)
    (tmp_path / "first.safetensors").write_bytes(b"whole")
    (tmp_path / ".writing-adapter").mkdir()
    (tmp_path / ".writing-adapter" / "first.safetensors").write_bytes(b"cut sh")  # the run's name then
    run.finish()
    assert (tmp_path / "first.safetensors").read_bytes() == b"whole" and not (tmp_path / ".writing-adapter").exists()


def test_a_preview_is_whole_or_not_there(plan, cache_folder, tmp_path, monkeypatch):
    run = train.begin(plan, tmp_path, cache_folder)

    def cut(picture, file, *_, **__):
        with open(file, "wb") as handle:
            handle.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", cut)
    with pytest.raises(KeyboardInterrupt):
        run._preview(None)
    assert not list((tmp_path / "previews").iterdir())
