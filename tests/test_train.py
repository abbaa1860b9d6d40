"""The loop: resumed = uninterrupted, accumulation = a larger batch, and nothing is lost when it has to stop."""

import dataclasses
import json
import signal

import numpy as np
import pytest
import torch
from helpers import Stop, Watcher, same_adapter, stop_after
from safetensors.torch import load_file

from naruto_lora import checkpoint, data, lora, models, step, train
from naruto_lora.recipe import RECIPES, Leg


def numbers(parameters):
    return torch.cat([p.detach().flatten() for p in parameters])


def test_the_record_describes_the_run(plan, trained, examples):
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
def test_a_resumed_run_equals_an_uninterrupted_one(previewed, trained, cache_folder, tmp_path, steps):
    """The stock script starts the epoch again, in another order."""
    out = tmp_path / trained.folder.name
    with pytest.raises(Stop):
        train.train(previewed, out, cache_folder, stop_after(steps))
    assert not (out / lora.FILE).exists()
    for name in (".writing-4", ".old-checkpoint-0"):  # of a killed write, and of a killed removal
        (out / name).mkdir(exist_ok=True)
        (out / name / "state.json").write_text("{")
    record = train.train(previewed, out, cache_folder)
    assert same_adapter(out, trained.folder)
    assert record["losses"] == trained.record["losses"] and record["holdout"] == trained.record["holdout"]
    assert record["best_step"] == trained.record["best_step"]
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in trained.folder.iterdir())
    ours, theirs = (load_file(checkpoint.find(f)[-1] / "optimizer.safetensors") for f in (out, trained.folder))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_legs_can_be_added_later(plan, trained, cache_folder, tmp_path):
    first = train.train(plan.replace(name="first", legs=plan.legs[:1]), tmp_path, cache_folder)
    assert first["step"] == 4 and not same_adapter(tmp_path, trained.folder)
    seen = []
    record = train.train(plan, tmp_path, cache_folder, lambda phase, done, total, **_: seen.append((phase, done)))
    assert [done for phase, done in seen if phase == "training"] == [5, 6]
    assert same_adapter(tmp_path, trained.folder) and record["losses"] == trained.record["losses"]
    assert list(record["holdout"]) == ["0", "4", "6"]


def test_a_finished_run_is_not_trained_again(previewed, trained, cache_folder):
    before, seen = trained.adapter.read_bytes(), []
    record = train.train(previewed, trained.folder, cache_folder, lambda phase, *_, **__: seen.append(phase))
    assert "training" not in seen and trained.adapter.read_bytes() == before
    assert record["losses"] == trained.record["losses"]


def test_accumulation_is_one_larger_batch(plan, cache_folder, tmp_path):
    gradients, losses = [], []
    for batch, accumulation in ((6, 1), (3, 2), (1, 6), (4, 2)):
        run = train.begin(plan.replace(batch=batch, accumulation=accumulation), tmp_path, cache_folder)
        draw = train.step.draw(plan, 0, run.training_set.shapes)
        losses.append(run._accumulate(draw).mean().item())
        gradients.append(torch.cat([p.grad.flatten() for p in run.parameters]))
    for loss, gradient in zip(losses[1:], gradients[1:], strict=True):
        assert loss == pytest.approx(losses[0], rel=1e-5)
        assert (gradient - gradients[0]).norm() < 1e-4 * gradients[0].norm()


def repeated(encoded, count):
    """A cache of `count` examples, which repeat those of `encoded`."""
    columns = {name: (getattr(encoded, name) * count)[:count] for name in
               ("names", "shapes", "latents", "mirrored", "prompts")}
    return dataclasses.replace(encoded, **columns)


@pytest.mark.parametrize("batch, accumulation", [(12, 8), (1, 8)])
def test_the_recipes_own_accumulation_is_one_batch(plan, encoded, cache_folder, tmp_path, batch, accumulation):
    sizes, found = ((batch, accumulation), (batch * accumulation, 1)), []
    for size, count in sizes:
        run = train.begin(plan.replace(batch=size, accumulation=count), tmp_path, cache_folder)
        run.training_set = repeated(encoded, 100)
        draw = step.draw(run.recipe, 0, run.training_set.shapes)
        assert len(draw.indices) == batch * accumulation
        losses = run._accumulate(draw)
        found.append((losses, torch.cat([p.grad.flatten() for p in run.parameters])))
    (losses, gradient), (whole_losses, whole) = found
    torch.testing.assert_close(losses, whole_losses, rtol=1e-4, atol=1e-6)
    assert (gradient - whole).norm() < 1e-4 * whole.norm()


def test_a_step_on_the_cache_equals_one_on_new_encodings(plan, examples, pipe, cache_folder, tmp_path):
    run = train.begin(plan, tmp_path, cache_folder)
    draw = step.draw(plan, 0, run.training_set.shapes)
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


def test_a_short_last_batch_is_averaged_over_its_own_size(plan, cache_folder, tmp_path):
    run = train.begin(plan, tmp_path, cache_folder)
    last = train.step.steps_per_epoch(len(run.training_set), plan) - 1
    draw = train.step.draw(plan, last, run.training_set.shapes)
    count = len(draw.indices)
    assert 0 < count < plan.pictures_per_step and count % plan.batch  # short, with a short last micro-batch
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


def test_a_learning_rate_added_on_resume_is_used(plan, cache_folder, tmp_path):
    """The stock script's saved scheduler kept the old rate."""
    train.train(plan.replace(legs=(Leg(2, 1e-3),)), tmp_path, cache_folder)
    run = train.begin(plan.replace(legs=(Leg(2, 1e-3), Leg(3, 7e-5))), tmp_path, cache_folder)
    run.update()
    assert run.optimizer.param_groups[0]["lr"] == 7e-5


def test_a_loss_that_is_not_finite_names_its_picture_and_the_steps_before_it_are_saved(
    plan, trained, cache_folder, tmp_path, monkeypatch
):
    with pytest.raises(Stop):
        train.train(plan.replace(save_every=3), tmp_path, cache_folder, stop_after(4))
    run = train.begin(plan.replace(save_every=9), tmp_path, cache_folder)
    draw, real, calls = step.draw(plan, 4, run.training_set.shapes), step.diffusion_loss, []

    def poisoned(*arguments, **inputs):
        calls.append(1)
        losses = real(*arguments, **inputs)
        return losses * torch.tensor([1.0, 1.0, float("nan")]) if len(calls) == 3 else losses

    monkeypatch.setattr(step, "diffusion_loss", poisoned)
    with pytest.raises(RuntimeError) as caught:
        run.to_the_end()
    name, timestep = run.training_set.names[draw.indices[5]], draw.timesteps[5]
    assert str(caught.value).startswith(f"step 5: the loss is not finite for '{name}' (timestep {timestep}); the run")
    assert checkpoint.newest([tmp_path]).name == "checkpoint-4"  # all steps before it
    monkeypatch.undo()
    train.train(plan, tmp_path, cache_folder)
    assert same_adapter(tmp_path, trained.folder)


def test_gradients_that_stay_infinite_stop_the_run_and_change_nothing(plan, cache_folder, tmp_path):
    run = train.begin(plan, tmp_path, cache_folder)
    run.parameters[1].register_hook(lambda gradient: gradient * float("inf"))
    run.scaler = torch.amp.GradScaler("cpu")
    before, tried = numbers(run.parameters), []
    run.unet.register_forward_hook(lambda *_: tried.append(1))
    draw = train.step.draw(plan, 0, run.training_set.shapes)
    with pytest.raises(RuntimeError, match="step 1: the gradients are not finite for .* and 2 more; ") as caught:
        run.update()
    for k in range(4):
        assert f"'{run.training_set.names[draw.indices[k]]}' (timestep {draw.timesteps[k]})" in str(caught.value)
    assert len(tried) == train.RETRIES * plan.accumulation and torch.equal(numbers(run.parameters), before)
    assert run.scaler.get_scale() == 2.0**16  # not that of the last try, which would underflow after a resume


def test_half_changed_weights_are_not_saved(plan, trained, cache_folder, tmp_path, monkeypatch):
    """8-bit Adam allocates its state in its first step, layer by layer, and can run out of memory there."""
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


def test_an_overflowing_update_is_tried_again_and_not_counted(plan, cache_folder, tmp_path):
    """As with fp16 on a GPU, here with a loss scale that overflows fp32; the stock script counts such a step."""
    plain, scaled = (train.begin(plan, tmp_path / name, cache_folder) for name in ("plain", "scaled"))
    scaled.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    tried = []
    for run in (plain, scaled):
        for module in run.unet.modules():
            if hasattr(module, "lora_A"):
                module.scaling["default"] = 1e5  # large gradients; B is still zero, so the loss stays
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
        run._accumulate(train.step.draw(plan, 0, run.training_set.shapes))
        gradients.append(torch.cat([p.grad.flatten() for p in run.parameters]))
        passes.append(len(calls))
    assert passes == [plan.accumulation, 2 * plan.accumulation]
    assert torch.equal(*gradients)


def test_half_precision_makes_the_same_step(plan, base, encoded, cache_folder, tmp_path):
    """The GPU's code path on the CPU: fp16 U-Net under autocast, fp32 LoRA, scaled loss."""
    whole = train.begin(plan, tmp_path, cache_folder)
    unet = models.load_unet(base, torch.float16, torch.device("cpu"))
    parameters = lora.inject(unet, plan.rank, plan.alpha, plan.seed)
    half = train.Run(
        plan.replace(precision="fp16"), unet, parameters, encoded, encoded.part(0, 0), checkpoint.RunFolder(tmp_path)
    )
    (loss, norm), (half_loss, half_norm) = whole.update(), half.update()
    assert half.scaler.is_enabled() and {p.dtype for p in half.parameters} == {torch.float32}
    assert half_loss == pytest.approx(loss, rel=1e-2) and half_norm == pytest.approx(norm, rel=5e-2)
    ours, theirs = (torch.cat([p.grad.flatten() for p in run.parameters]) for run in (half, whole))
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0) > 0.99


def test_the_bar_is_shown_every_step(plan, cache_folder, tmp_path):
    watcher = Watcher()
    train.train(plan.replace(legs=(Leg(2, 1e-3),)), tmp_path, cache_folder, watcher)
    steps = [(done, total, figures) for phase, done, total, figures in watcher.seen if phase == "training"]
    assert [(done, total) for done, total, _ in steps] == [(1, 2), (2, 2)]
    for _, _, f in steps:
        assert f["lr"] == 1e-3 and f["loss"] > 0 and f["grad_norm"] > 0 and f["peak_gib"] is None
        assert f["images_per_second"] > 0 and f["left"] is None  # too early for a forecast


@pytest.mark.parametrize("number, raised", [
    (signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit), (signal.SIGHUP, SystemExit),
])  # fmt: skip
def test_an_interrupt_saves_first_and_the_run_resumes_bit_for_bit(
    plan, trained, cache_folder, tmp_path, number, raised
):
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    watcher = Watcher(lambda step: signal.raise_signal(number) if step == 3 else None)
    with pytest.raises(raised):
        train.train(plan, tmp_path, cache_folder, watcher)
    assert checkpoint.newest([tmp_path]).name == "checkpoint-3" and watcher.steps == [1, 2, 3]
    assert f"interrupted at step 3 of 6, saved in '{tmp_path / 'checkpoint-3'}': run it again" in watcher.notes[-1]
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    again = Watcher()
    train.train(plan, tmp_path, cache_folder, again)
    assert again.steps == [4, 5, 6] and same_adapter(tmp_path, trained.folder)
    assert again.notes[0] == f"resumes from {tmp_path / 'checkpoint-3'}, at step 3 of 6"


def test_an_interrupt_in_the_last_save_says_how_the_lora_is_written(plan, trained, cache_folder, tmp_path, monkeypatch):
    real, watcher = checkpoint.save, Watcher()

    def interrupted(folder, k, *rest):
        if k == plan.steps:
            signal.raise_signal(signal.SIGINT)
        return real(folder, k, *rest)

    monkeypatch.setattr(checkpoint, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.train(plan, tmp_path, cache_folder, watcher)
    assert not (tmp_path / lora.FILE).exists()
    assert watcher.notes[-1] == (
        f"interrupted at step 6 of 6, saved in '{tmp_path / 'checkpoint-6'}': run it again to continue"
    )
    again = Watcher()
    train.train(plan, tmp_path, cache_folder, again)
    assert again.steps == [] and same_adapter(tmp_path, trained.folder)


def test_an_interrupt_within_a_step_discards_that_step(plan, trained, cache_folder, tmp_path, monkeypatch):
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


def test_max_minutes_stop_the_run_cleanly(plan, trained, cache_folder, tmp_path, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(train.time, "monotonic", lambda: clock[0])
    short = plan.replace(max_minutes=2)
    watcher = Watcher(lambda step: clock.__setitem__(0, clock[0] + 50))  # seconds a step
    record = train.train(short, tmp_path, cache_folder, watcher)
    assert record["step"] == 3 and (tmp_path / lora.FILE).is_file()  # after 150 s, with the LoRA of step 3
    assert watcher.notes[-1].startswith("stopped by max_minutes = 2 at step 3 of 6, saved in")
    assert watcher.notes[-1].endswith("run it again to continue")
    monkeypatch.undo()
    assert train.train(short, tmp_path, cache_folder)["step"] == 6  # max_minutes count per session
    assert same_adapter(tmp_path, trained.folder)


def test_each_session_makes_at_least_one_step(plan, cache_folder, tmp_path):
    short = plan.replace(max_minutes=1e-6)
    assert [train.train(short, tmp_path, cache_folder)["step"] for _ in range(2)] == [1, 2]


def test_checkpoints_are_also_saved_by_the_clock(plan, cache_folder, tmp_path, monkeypatch):
    clock, saved = [1000.0], []
    monkeypatch.setattr(train.time, "monotonic", lambda: clock[0])
    real = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda folder, k, *rest: saved.append(k) or real(folder, k, *rest))
    rare = plan.replace(save_every=100, save_minutes=1.5)
    train.train(rare, tmp_path, cache_folder, Watcher(lambda step: clock.__setitem__(0, clock[0] + 50)))
    assert saved == [2, 4, 6]


def test_finishing_loads_no_second_model(plan, cache_folder, tmp_path, monkeypatch):
    """The stock script loads a whole pipeline there, and can run out of memory after hours."""
    run = train.begin(plan, tmp_path, cache_folder)

    def refuse(*_, **__):
        raise MemoryError

    for name in ("_load", "load_unet", "load_vae", "load_text_encoders"):
        monkeypatch.setattr(models, name, refuse)
    monkeypatch.setattr(run.validation, "preview", lambda done: None)
    run.to_the_end()
    assert run.finish()["step"] == 6 and (tmp_path / lora.FILE).is_file()


def stubbed(run, act=lambda: None):
    """The run with updates that compute nothing: `act()`, then a loss of 0.5."""
    run.update = lambda: (act(), (0.5, 1.0))[1]
    run.measure = lambda: None
    return run


class Unforeseen(Exception):
    pass


@pytest.mark.parametrize("half_changed, saved", [(False, [2, 3]), (True, [2])])
def test_whatever_ends_the_loop_saves_first(plan, cache_folder, tmp_path, half_changed, saved):
    def fail():
        if run.step == 3:
            run.half_changed = half_changed
            raise Unforeseen

    run = stubbed(train.begin(plan, tmp_path, cache_folder), fail)
    with pytest.raises(Unforeseen):
        run.to_the_end()
    assert [checkpoint.step_of(path) for path in checkpoint.find(tmp_path)] == saved
    assert len(checkpoint.read_state(checkpoint.find(tmp_path)[-1])["record"]["losses"]) == saved[-1]


def test_the_error_that_ended_the_loop_is_raised_even_if_saving_fails_too(plan, cache_folder, tmp_path, monkeypatch):
    def fail():
        raise Unforeseen

    run = stubbed(train.begin(plan, tmp_path, cache_folder), fail)
    monkeypatch.setattr(run, "save", lambda: 1 / 0)
    with pytest.raises(Unforeseen):
        run.to_the_end()


def test_news_that_cant_be_shown_end_no_training(plan, cache_folder, tmp_path):
    errors = [BrokenPipeError(32, "Broken pipe"), OSError(28, "No space left on device"), KeyError("left")]

    def show(*_, **__):
        errors.append(errors.pop(0))
        raise errors[-1]

    first, show.note = errors[0], show
    run = stubbed(train.begin(plan, tmp_path, cache_folder, show))
    run.to_the_end()
    assert run.finish()["step"] == 6 and (tmp_path / lora.FILE).is_file() and run.show.error is first


def test_a_clock_that_is_put_back_changes_nothing(plan, cache_folder, tmp_path, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(train.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(train.time, "time", lambda: 9000 - 100 * clock[0])
    rare = plan.replace(save_every=100, save_minutes=1.5, max_minutes=6)
    run = stubbed(train.begin(rare, tmp_path, cache_folder), lambda: clock.__setitem__(0, clock[0] + 50))
    run.to_the_end()
    assert [checkpoint.step_of(path) for path in checkpoint.find(tmp_path)] == [2, 4, 6]
    assert run.record["seconds"] == 300
