"""The training loop: from a recipe to LoRA files and the run's record."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import statistics
import time
from pathlib import Path

import torch

from . import cache, call_as, checkpoint, data, lora, models, session, step
from . import recipe as recipes
from .measure.validation import Validation
from .memory import gpu, lean
from .memory import plan as plans
from .memory.fallback import Fallback, Rung
from .memory.optimizer import make_optimizer
from .progress import Listener

MAX_GRAD_NORM = 1.0
RETRIES = 16  # tries of an update whose fp16 gradients overflow, each at half the loss scale


def train(recipe, out: str | Path, cache_folder: str | Path | None = None, show=None, mirror=None) -> dict:
    """Trains `recipe` in the folder `out`, resuming from its newest checkpoint; returns the run's record.

    Writes run.json and the LoRA twice to `out`: pytorch_lora_weights.safetensors (diffusers) and <name of
    `out`>.safetensors (every other program). `mirror` is a second folder (on Google Drive) for copies that outlive this
    machine; `show` as in `progress`.
    Raises what `begin` raises, before any training, and what `Run.to_the_end` raises.
    """
    run = begin(recipe, out, cache_folder, show, mirror)
    with contextlib.closing(run.folder):
        run.to_the_end()
        return run.finish()


def begin(recipe, out: str | Path, cache_folder=None, show=None, mirror=None, rungs=None) -> Run:
    """A run ready for its next update: data checked and encoded, U-Net with LoRA loaded, checkpoint restored.

    `rungs` are ways to compute it (`memory.fallback.Rung`), each with less memory than the one before; by default
    `memory.plan` chooses them for this machine. Raises FileNotFoundError, OSError, RuntimeError or ValueError with
    one sentence on what is missing or wrong; the cheapest checks come first. The run's folder and mirror are its own
    until `run.folder.close()`.
    """
    begun, recipe, show = time.monotonic(), recipes.load(recipe), Listener(show)
    models.device_for(recipe.precision)
    folder = checkpoint.RunFolder(out, mirror, show)
    try:
        return _begin(recipe, folder, cache_folder, rungs, begun)
    except BaseException:
        folder.close()
        raise


def _begin(recipe, folder: checkpoint.RunFolder, cache_folder, rungs, begun: float) -> Run:
    show, device = folder.show, models.device_for(recipe.precision)
    models.check_base(recipe.base, recipe.vae)
    training, holdout = data.split(data.load(recipe.dataset, show=show), recipe.holdout)
    checkpoints = folder.newest()
    sources = checkpoint.sources_of(recipe, training, holdout)
    for path in checkpoints:  # also the older one: this run would delete another run's checkpoints
        checkpoint.refuse_changes(recipe, sources, checkpoint.read_state(path), path.parent)
    gpu.free()
    gpu.use_expandable_segments()
    card = gpu.Card.here(device)  # while the GPU is still empty
    if rungs is None:
        done = checkpoint.step_of(checkpoints[0]) if checkpoints else 0
        rungs = _rungs(recipe, card, recipe.steps - done, show)
    encoded = _encode(recipe, folder, cache_folder, training, holdout, show)

    gpu.free()
    gpu.reset_peak()
    unet = models.load_unet(recipe.base, models.DTYPES[recipe.precision], device)
    parameters = lora.inject(unet, recipe.rank, recipe.alpha, recipe.seed)
    checkpoint.check_disk(folder.out, parameters)
    if rungs[0].lean and (reason := lean.unsupported(unet)):
        show.note(f"the plain step, not the lean one: {reason}")
        rungs = _rungs(recipe, card, 0, show, allow_lean=False)
    training_set, holdout_set = encoded.part(0, len(training)), encoded.part(len(training), len(encoded))
    run = Run(recipe, unet, parameters, training_set, holdout_set, folder, rungs, sources, begun)
    run.resume(checkpoints)
    return run


def _rungs(recipe, card: gpu.Card, steps_left: int, show, allow_lean: bool = True) -> list[Rung]:
    """The ways to compute `recipe` on this machine, the chosen one first, which it shows. On a CPU: the plain step."""
    made = plans.plan(recipe, card, steps_left, lean=allow_lean and card.cuda)
    if card.cuda:
        show.note(made.sentence())
    return made.rungs


def _encode(recipe, folder: checkpoint.RunFolder, cache_folder, training, holdout, show) -> cache.Cache:
    """The training set, then the hold-out, encoded; by default the cache is beside the run's folder and its mirror."""
    place = Path(cache_folder) if cache_folder else folder.out.parent / "cache"
    copies = folder.mirror and folder.mirror.parent / "cache"
    return cache.encode(training + holdout, recipe, place, show, copies, held=len(holdout))


class Run:
    """A training run: everything that an update reads or changes, and the `folder` that keeps it."""

    def __init__(self, recipe, unet, parameters, training, holdout, folder, rungs=None, sources=None, begun=None):
        self.recipe, self.unet, self.parameters = recipe, unet, parameters
        self.training_set, self.holdout_set, self.device = training, holdout, unet.device
        self.folder, self.show, self.sources = folder, folder.show, sources or {}
        self.alphas_cumprod = models.load_alphas_cumprod(recipe.base).to(self.device)
        self.optimizer = make_optimizer(parameters, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.precision == "fp16")
        self.fallback = Fallback(unet, parameters, rungs or [Rung(recipe.batch, lean=False)], self.show)
        self.validation = Validation(
            recipe, unet, training, holdout, self.alphas_cumprod, self.fallback, folder, self.show
        )
        self.step, self.holdout_loss = 0, None  # finished updates; the newest mean hold-out loss
        self.record: dict = {"losses": [], "holdout": {}, "best_step": None, "seconds": 0.0}
        self.forecast, self.interrupts = session.Forecast(recipe, begun or time.monotonic()), session.Interrupts()
        self.half_changed = False  # True while the optimizer changes the weights
        self.measured = 0  # measurements of the hold-out in the newest checkpoint

    @property
    def engine(self):
        """The engine that computes micro-batches: `step.Plain` or `memory.lean.Lean`; the fallback can replace it."""
        return self.fallback.engine

    def resume(self, checkpoints: list[Path]) -> None:
        """Restores the first of `checkpoints` that can be read; without one the run starts at step 0."""
        for path in checkpoints:
            try:
                local = self.folder.local(path)
            except OSError as error:  # the mirror can't be read
                self.show.note(f"{path} can't be copied ({error.strerror or error})")
                continue
            state = checkpoint.read_state(local)
            checkpoint.restore(local, self.unet, self.optimizer)
            self.engine.refresh()
            self.step, self.record, self.folder.saved_step = state["step"], state["record"], state["step"]
            self.scaler.load_state_dict(state["scaler"])
            self.measured = len(self.record["holdout"])
            self.folder.mirror_checkpoint(local, self.record["best_step"])
            self.show.note(f"resumes from {path}, at {self._position()}")
            return

    def to_the_end(self) -> None:
        """Runs the remaining updates, or as many as `max_minutes` allow.

        On Ctrl-C, SIGTERM or a closed terminal it saves a checkpoint, then raises KeyboardInterrupt or SystemExit.
        It also saves one before any other exception, unless the weights are half changed.
        Raises RuntimeError for a loss or gradients that are not finite, OSError for a full disk.
        """
        with self.interrupts:
            try:
                self._loop()
                self.interrupts.check()  # of the last save
            except session.Interrupted:
                self.save()
                self.show.note(f"interrupted at {self._position()}, {self.folder.saved_where()}")
            except Exception:
                with contextlib.suppress(Exception):  # the first error is the one to tell
                    if not self.half_changed:
                        self.save()
                raise
        self.interrupts.raise_received()

    def _loop(self) -> None:
        recipe, first_forecast = self.recipe, self.step + session.CALIBRATION
        seconds_before = self.record["seconds"] - self.forecast.elapsed()
        if self._due(recipe.measure_every):  # step 0, or one whose measurement was interrupted
            self.measure()
            if self.folder.saved_step == self.step:
                self.save()
        while self.step < recipe.steps:
            if self.forecast.over_budget():
                self.save()
                budget = f"max_minutes = {recipe.max_minutes:g}"
                self.show.note(f"stopped by {budget} at {self._position()}, {self.folder.saved_where()}")
                return
            with self.forecast.timed("update"):
                loss, grad_norm = self.update()
            self.step += 1
            self.record["losses"].append(loss)
            for text in self.engine.notes:
                self.show.once(text)
            self.record["seconds"] = seconds_before + self.forecast.elapsed()
            self.show("training", self.step, recipe.steps, **self._figures(loss, grad_norm))
            if self.step == first_forecast < recipe.steps:
                self.show.note(self.forecast.sentence(self.step))
            if measure_due := self._due(recipe.measure_every):
                self.measure()
            if measure_due or self._due(recipe.save_every) or self._save_overdue():
                self.save()

    def update(self) -> tuple[float, float]:
        """One optimizer step over `batch * accumulation` pictures; returns its mean loss and gradient norm.

        If fp16 gradients overflow, it tries the same step again at half the loss scale: no step is skipped. If the
        loss, or after RETRIES tries the gradients, are not finite, it leaves the weights unchanged and raises
        RuntimeError with the names of pictures and their timesteps.
        """
        draw = step.draw(self.recipe, self.step, self.training_set.shapes)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate(self.step)
        scaler_before = None
        for _ in range(RETRIES):
            losses = self.fallback.run(functools.partial(self._accumulate, draw), self.step + 1)
            self.scaler.unscale_(self.optimizer)
            grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
            *losses, grad_norm = torch.cat([losses, grad_norm[None]]).tolist()  # the step's only copy from the GPU
            if math.isfinite(grad_norm):
                self.half_changed = True
                self.optimizer.step()
                self.engine.refresh()
                self.scaler.update()
                self.half_changed = False
                return statistics.fmean(losses), grad_norm
            scaler_before = scaler_before or self.scaler.state_dict()
            self.scaler.update()  # halves the loss scale
            if not (self.scaler.is_enabled() and all(map(math.isfinite, losses))):
                break
        self.scaler.load_state_dict(scaler_before)  # so that a resumed run starts with the scale that worked
        raise RuntimeError(step.describe_not_finite(self.step + 1, draw, losses, self.training_set.names))

    def _accumulate(self, draw: step.Draw) -> torch.Tensor:
        """Computes the gradients of the draw's mean loss, in micro-batches; returns the losses (E,) on the device."""
        self.engine.zero_grad()
        size, losses = self.fallback.rung.batch, []
        count, micro_batches = len(draw.indices), step.micro_batches(draw, self.training_set.shapes, size)
        for positions in micro_batches:
            self.interrupts.check()
            seed = self.scaler.scale(torch.full((len(positions),), 1 / count, device=self.device))
            losses.append(self.engine.accumulate(self._inputs(draw, positions), seed))
        order = torch.tensor([position for positions in micro_batches for position in positions]).argsort()
        return torch.cat(losses)[gpu.send(order, self.device)]

    def _inputs(self, draw: step.Draw, at: list[int]) -> dict[str, torch.Tensor]:
        """The inputs of `diffusion_loss` for the positions `at` in the draw."""
        indices, latent_noise = draw.indices[at], [draw.latent_noise[k] for k in at]
        inputs = self.training_set.batch(indices, latent_noise, draw.dropped[at], draw.flipped[at], self.device)
        return inputs | {
            "timesteps": gpu.send(draw.timesteps[at], self.device),
            "noise": gpu.send(torch.stack([draw.noise[k] for k in at]), self.device),
            "alphas_cumprod": self.alphas_cumprod,
        }

    def measure(self) -> None:
        """Measures the hold-out loss at this step and draws previews."""
        with self.forecast.timed("measure"), self.interrupts.immediate():
            self.holdout_loss = self.validation.measure(self.step, self.record)

    def save(self) -> None:
        """Writes checkpoint-<step>, here and in the mirror, unless it is there as it would be; removes old ones."""
        if self.folder.saved_step == self.step and self.measured == len(self.record["holdout"]):
            return
        state = {"recipe": json.loads(self.recipe.to_json()), "sources": self.sources, "record": self.record}
        state["scaler"] = self.scaler.state_dict()
        with self.forecast.timed("save"):
            self.folder.save(self.step, self.unet, self.optimizer, state)
        self.measured = len(self.record["holdout"])

    def finish(self) -> dict:
        """Writes the current LoRA and the record to the run's folder; returns the record. Raises OSError."""
        record = self.record | {
            "recipe": json.loads(self.recipe.to_json()),
            "step": self.step,
            "pictures": {"training": len(self.training_set), "holdout": len(self.holdout_set)},
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU",
            "peak_gib": gpu.peak_gib(),
            "adapter": str(self.folder.out / lora.FILE),
            "file": lora.file_name(self.folder.out, self.recipe.name),
        }
        self.folder.finish(self.unet, self.recipe, record)
        return record

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.recipe.steps

    def _save_overdue(self) -> bool:
        return 0 < self.recipe.save_minutes <= (time.monotonic() - self.folder.saved_at) / 60

    def _position(self) -> str:
        return f"step {self.step} of {self.recipe.steps}"

    def _figures(self, loss: float, grad_norm: float) -> dict:
        return {
            "loss": loss,
            "lr": self.recipe.learning_rate(self.step - 1),
            "grad_norm": grad_norm,
            "holdout": self.holdout_loss,
            "images_per_second": self.recipe.pictures_per_step / self.forecast.update(),
            "peak_gib": gpu.peak_gib(),
            "left": self.forecast.seconds(self.step, self.recipe.steps),
        }


call_as(__name__, train)
