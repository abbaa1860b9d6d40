"""Hold-out losses and previews of a model in training."""

import dataclasses
import signal
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Watcher, same_adapter
from PIL import Image

from naruto_lora import checkpoint, models, pipeline, session, train
from naruto_lora.measure import validation
from naruto_lora.recipe import Leg

CPU = torch.device("cpu")


def test_holdout_losses_do_not_depend_on_the_batch_or_the_random_state(base, encoded):
    unet, alphas = models.load_unet(base, torch.float32, CPU), models.load_alphas_cumprod(base)
    one = validation.holdout_losses(unet, encoded, alphas, CPU, batch=3, draws=2)
    torch.manual_seed(77)
    two = validation.holdout_losses(unet, encoded, alphas, CPU, batch=len(encoded), draws=2)
    assert one.shape == (len(encoded), 2)
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    assert not one.requires_grad


def test_holdout_losses_have_one_column_for_each_timestep_bin_and_no_flips(encoded):
    """This U-Net predicts its timestep, so the losses show which timesteps each column had."""

    class EchoesTimestep(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, sample, timesteps, encoder_hidden_states, added_cond_kwargs):
            scaled = timesteps.view(-1, 1, 1, 1) * torch.ones_like(sample)
            return type("Output", (), {"sample": scaled})

    alphas = torch.full((1000,), 0.5)
    rows = dataclasses.replace(encoded, mirrored=())
    losses = validation.holdout_losses(EchoesTimestep(), rows, alphas, CPU, batch=5)
    means = losses.sqrt() / 250  # the noise adds 1 to a timestep's square
    assert losses.shape == (len(encoded), 4)
    for k in range(4):
        assert (means[:, k] > k - 1e-2).all() and (means[:, k] < k + 1 + 1e-2).all()


def test_an_empty_holdout_is_an_error(encoded):
    with pytest.raises(ValueError, match="no picture was held out .the recipe's holdout is 0."):
        validation.holdout_losses(None, encoded.part(0, 0), None, CPU, batch=1)


def test_holdout_losses_over_mixed_shapes_do_not_depend_on_the_batch(mixed, base):
    unet, alphas = models.load_unet(base, torch.float32, CPU), models.load_alphas_cumprod(base)
    one, all_ = (validation.holdout_losses(unet, mixed[1], alphas, CPU, batch=size, draws=2) for size in (1, 6))
    torch.testing.assert_close(one, all_, rtol=1e-4, atol=1e-5)


def test_without_a_holdout_nothing_is_measured(plan, cache_folder, tmp_path):
    record = train.train(plan.replace(holdout=0.0, legs=(Leg(1, 1e-3),)), tmp_path, cache_folder)
    assert record["holdout"] == {} and record["best_step"] is None
    assert record["pictures"] == {"training": 24, "holdout": 0}


def test_an_interrupt_stops_a_measurement_at_once(plan, cache_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(validation, "holdout_losses", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    run = train.begin(plan, tmp_path, cache_folder)
    with pytest.raises(KeyboardInterrupt):
        run.to_the_end()
    assert run.record["holdout"] == {} and run.step == 0


def test_the_best_step_is_marked_and_its_checkpoint_kept(plan, cache_folder, tmp_path, monkeypatch):
    means = iter((1.0, 0.9, 0.5, 0.7, 0.6, 0.8, 0.9))
    monkeypatch.setattr(validation, "holdout_losses", lambda *_, **__: torch.full((3, 4), next(means)))
    long = plan.replace(legs=(Leg(12, 1e-3),), measure_every=2, save_every=1, previews=0)
    record = train.train(long, tmp_path, cache_folder)
    assert list(record["holdout"]) == ["0", "2", "4", "6", "8", "10", "12"] and record["best_step"] == 4
    assert [checkpoint.step_of(path) for path in checkpoint.find(tmp_path)] == [4, 10, 11, 12]
    assert checkpoint.read_state(tmp_path / "checkpoint-12")["record"]["best_step"] == 4


def test_previews_are_drawn_as_the_pipeline_draws(plan, trained, examples):
    pipe = pipeline.load(plan.base, adapters={"style": trained.folder})
    options = dict(steps=20, guidance_scale=4.0, resolution=plan.resolution)
    base, style = (np.asarray(pipeline.draw(pipe, [examples[1][1].caption], 1, a, **options)[0], float)
                   for a in ("base", "style"))
    for number, same, other in ((0, base, style), (6, style, base)):
        drawn = Image.open(trained.folder / "previews" / f"step-{number:06d}-1.jpg")
        assert drawn.size == (plan.resolution, plan.resolution)
        assert np.abs(drawn - same).mean() < 10 < 20 < np.abs(drawn - other).mean()  # JPEG's loss, another picture
    names = sorted(path.name for path in (trained.folder / "previews").iterdir())
    assert names == [f"step-{k:06d}-{n}.jpg" for k in (0, 6) for n in (0, 1)]


def test_failed_previews_do_not_stop_training(previewed, trained, cache_folder, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(validation, "draw_previews", fail)
    watcher = Watcher()
    train.train(previewed, tmp_path, cache_folder, watcher)
    assert same_adapter(tmp_path, trained.folder)
    message = "no previews (OutOfMemoryError: CUDA out of memory); the run continues"
    assert [text for text in watcher.notes if "previews" in text] == [message]


@pytest.mark.parametrize("at", [4, 6])
def test_an_interrupted_measurement_is_repeated_on_resuming(
    plan, cache_folder, trained, tmp_path, monkeypatch, at
):
    plan, real, calls = plan.replace(measure_every=2, previews=0), validation.holdout_losses, []
    whole = train.train(plan, tmp_path / "whole", cache_folder)

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 1 + at // 2:
            signal.raise_signal(signal.SIGINT)
        return real(*arguments, **options)

    monkeypatch.setattr(validation, "holdout_losses", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.train(plan, tmp_path / "cut", cache_folder, mirror=tmp_path / "mirror")
    assert str(at) not in checkpoint.read_state(tmp_path / "cut" / f"checkpoint-{at}")["record"]["holdout"]
    monkeypatch.undo()
    record = train.train(plan, tmp_path / "cut", cache_folder, mirror=tmp_path / "mirror")
    assert record["holdout"] == whole["holdout"] and record["best_step"] == whole["best_step"]
    for folder in ("cut", "mirror"):  # the checkpoint learned it too
        state = checkpoint.read_state(checkpoint.newest([tmp_path / folder]))
        assert state["record"]["holdout"] == whole["holdout"] and state["record"]["best_step"] == whole["best_step"]


def test_there_are_no_half_written_previews(previewed, cache_folder, tmp_path, monkeypatch):
    run = train.begin(previewed, tmp_path, cache_folder)

    def cut(path, content):
        with open(path, "wb") as handle:
            handle.write(content[:4])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", cut)
    with pytest.raises(KeyboardInterrupt):
        run.validation.preview(0)
    assert not list((tmp_path / "previews").iterdir())


def test_previews_that_a_kill_left_without_a_copy_are_copied(previewed, encoded, tmp_path):
    folder = checkpoint.RunFolder(tmp_path / "run", tmp_path / "mirror")
    (folder.out / "previews").mkdir()
    for k in range(previewed.previews):
        (folder.out / "previews" / f"step-000004-{k}.jpg").write_bytes(b"drawn")
    run = validation.Validation(previewed, None, encoded, encoded, None, None, folder, None)
    run.preview(4)
    copies = sorted((folder.mirror / "previews").iterdir())
    assert [path.name for path in copies] == [f"step-000004-{k}.jpg" for k in range(previewed.previews)]
    assert all(path.read_bytes() == b"drawn" for path in copies)


def test_a_measurement_and_the_best_step_enter_the_record_together(plan, encoded, monkeypatch):
    def interrupt(*_):
        raise session.Interrupted

    fallback = types.SimpleNamespace(run=lambda *_: torch.ones(2, 4))
    run = validation.Validation(plan, None, encoded, encoded, None, fallback, None, None)
    record = {"holdout": {"0": [[2.0]]}, "best_step": None}
    monkeypatch.setattr(validation.statistics, "fmean", interrupt)
    with pytest.raises(session.Interrupted):
        run.measure(4, record)
    assert record == {"holdout": {"0": [[2.0]]}, "best_step": None}
    monkeypatch.undo()
    monkeypatch.setattr(run, "preview", lambda done: None)
    assert run.measure(4, record) == 1
    assert list(record["holdout"]) == ["0", "4"] and record["best_step"] == 4
