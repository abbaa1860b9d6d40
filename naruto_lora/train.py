"""The training loop: a recipe in, a LoRA file and the run's record out."""

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
from .progress import Listener

MAX_GRAD_NORM = 1.0
RETRIES = 16  # times that an overflowing update is tried again, at half the loss scale each


def train(recipe, out: str | Path, cache_folder: str | Path | None = None, show=None, mirror=None) -> dict:
    """Trains `recipe` in the folder `out`, resuming from its newest checkpoint; returns the run's record.

    Leaves in `out` pytorch_lora_weights.safetensors (diffusers), <recipe's name>.safetensors (ComfyUI, A1111) and
    run.json. `mirror` is a second folder (Google Drive) for all that must outlive this machine. `show` is as in
    `progress`. Raises what `begin` raises, before anything is trained, and what `Run.to_the_end` does.
    """
    run = begin(recipe, out, cache_folder, show, mirror)
    run.to_the_end()
    return run.finish()


def begin(recipe, out: str | Path, cache_folder=None, show=None, mirror=None, rungs=None) -> Run:
    """A run ready for its next update: data checked and encoded, U-Net with LoRA loaded, checkpoint restored.

    `rungs` are the ways to compute it (`memory.fallback.Rung`), each taking less memory than the one before; without
    them `memory.plan` chooses for this machine. Raises FileNotFoundError, OSError, RuntimeError or ValueError with one
    sentence for what is missing or wrong, cheapest checks first.
    """
    begun, recipe, show = time.time(), recipes.load(recipe), Listener(show)
    device = models.device_for(recipe.precision)
    folder = checkpoint.RunFolder(out, mirror, show)
    models.check_base(recipe.base, recipe.vae)
    examples, held = data.split(data.load(recipe.dataset), recipe.holdout)
    found = folder.newest()
    sources = checkpoint.sources_of(recipe, examples, held)
    for path in found:  # the older one too: another run's checkpoints would be rotated away
        checkpoint.refuse_changes(recipe, sources, checkpoint.read_state(path), path.parent)
    gpu.free()
    gpu.expandable()
    card = gpu.Card.here(device)  # before anything is on it
    if rungs is None:
        rungs = _rungs(recipe, card, recipe.steps - (checkpoint.step_of(found[0]) if found else 0), show)
    encoded = _encode(recipe, folder, cache_folder, examples, held, show)

    gpu.free()
    gpu.reset_peak()
    unet = models.load_unet(recipe.base, models.DTYPES[recipe.precision], device)
    parameters = lora.inject(unet, recipe.rank, recipe.alpha, recipe.seed)
    checkpoint.enough_disk(folder.out, parameters)
    if rungs[0].lean and (reason := lean.unsupported(unet)):
        show.note(f"the plain step, not the lean one: {reason}")
        rungs = _rungs(recipe, card, 0, show, fast=False)
    trained, held = encoded.part(0, len(examples)), encoded.part(len(examples), len(encoded))
    run = Run(recipe, unet, parameters, trained, held, folder, rungs, sources, begun)
    run.resume(found)
    return run


def _rungs(recipe, card: gpu.Card, steps_left: int, show, fast: bool = True) -> list[Rung]:
    """The ways to compute `recipe` on this machine, the chosen one first; says which. On a CPU the plain step."""
    made = plans.plan(recipe, card, steps_left, lean=fast and card.cuda)
    if card.cuda:
        show.note(made.sentence())
    return made.rungs


def _encode(recipe, folder: checkpoint.RunFolder, cache_folder, examples, held, show) -> cache.Cache:
    """The training pictures, then the hold-out, encoded; the cache lies beside the run's folder and its mirror."""
    place = Path(cache_folder) if cache_folder else folder.out.parent / "cache"
    copies = folder.mirror and folder.mirror.parent / "cache"
    return cache.encode(examples + held, recipe, place, show, copies, held=len(held))


class Run:
    """A training run: everything that an update reads or changes. `folder` is where it is saved."""

    def __init__(self, recipe, unet, parameters, trained, held, folder, rungs=None, sources=None, begun=None):
        self.recipe, self.unet, self.parameters = recipe, unet, parameters
        self.trained, self.held, self.device = trained, held, unet.device
        self.folder, self.show, self.sources = folder, folder.show, sources or {}
        self.alphas_cumprod = models.load_alphas_cumprod(recipe.base).to(self.device)
        self.optimizer = make_optimizer(parameters, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.precision == "fp16")
        self.fallback = Fallback(unet, parameters, rungs or [Rung(recipe.batch, lean=False)], self.show)
        self.validation = Validation(
            recipe, unet, trained, held, self.alphas_cumprod, self.fallback, folder, self.show
        )
        self.step, self.holdout = 0, None  # updates done; the newest mean hold-out loss
        self.record = {"losses": [], "holdout": {}, "best_step": None, "seconds": 0.0}
        self.forecast, self.interrupts = session.Forecast(recipe, begun or time.time()), session.Interrupts()
        self.half_changed = False  # inside the optimizer's step, where some weights are new and some old

    @property
    def engine(self):
        """What computes the micro-batches now: `step.Plain` or `memory.lean.Lean`."""
        return self.fallback.engine

    def resume(self, found: list[Path]) -> None:
        """Restores the first checkpoint of `found` that can be read; without one the run begins at step 0."""
        for path in found:
            try:
                here = self.folder.bring(path)
            except OSError as error:  # a mirror that can't be read after all
                self.show.note(f"{path} can't be copied ({error.strerror or error})")
                continue
            state = checkpoint.read_state(here)
            checkpoint.restore(here, self.unet, self.optimizer)
            self.engine.refresh()
            self.step, self.record, self.folder.saved = state["step"], state["record"], state["step"]
            self.scaler.load_state_dict(state["scaler"])
            self.folder.mirror_checkpoint(here, self.record["best_step"])
            self.show.note(f"resumes from {path}, at {self._place()}")
            return

    def to_the_end(self) -> None:
        """Runs the updates that are left, or as many as `max_minutes` allow.

        Ctrl-C, a kernel's interrupt and SIGTERM save a checkpoint first; then KeyboardInterrupt or SystemExit is
        raised. Raises RuntimeError for a step that isn't finite, OSError for a full disk.
        """
        with self.interrupts:
            try:
                self._loop()
            except session.Interrupted:
                self.save()
                self.show.note(f"interrupted at {self._place()}, {self.folder.where()}")
        self.interrupts.pass_on()

    def _loop(self) -> None:
        recipe, calibrated = self.recipe, self.step + session.CALIBRATION
        earlier = self.record["seconds"] - self.forecast.elapsed()
        if self._due(recipe.measure_every):  # at the start, or where an interrupt cut a measurement short
            self.measure()
        while self.step < recipe.steps:
            if self.forecast.over_budget():
                self.save()
                minutes = f"max_minutes = {recipe.max_minutes:g}"
                self.show.note(f"stopped by {minutes} at {self._place()}, {self.folder.where()}")
                return
            loss, norm = self._update_or_save()
            self.step += 1
            self.record["losses"].append(loss)
            self.record["seconds"] = earlier + self.forecast.elapsed()
            self.show("training", self.step, recipe.steps, **self._figures(loss, norm))
            if self.step == calibrated < recipe.steps:
                self.show.note(self.forecast.sentence(self.step))
            measured = self._due(recipe.measure_every)
            if measured:
                self.measure()
            if measured or self._due(recipe.save_every) or self._save_overdue():
                self.save()

    def _update_or_save(self) -> tuple[float, float]:
        try:
            with self.forecast.timed("update"):
                result = self.update()
        except RuntimeError:  # out of memory, or not finite: what is trained is saved, if it isn't half changed
            if not self.half_changed:
                with contextlib.suppress(OSError):
                    self.save()
            raise
        for text in self.engine.news:
            self.show.once(text)
        return result

    def update(self) -> tuple[float, float]:
        """One optimizer step over `batch * accumulation` pictures; returns its mean loss and gradient norm.

        If its gradients overflow, the same step is tried again at half the loss scale: a skipped update is no step.
        Raises RuntimeError, naming pictures and timesteps, if its loss or, after some tries, its gradients are not
        finite; the weights are then as they were.
        """
        draw = step.draw(self.recipe, self.step, self.trained.shapes)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate(self.step)
        scale = None
        for _ in range(RETRIES):
            losses = self.fallback.run(functools.partial(self._accumulate, draw), self.step + 1)
            self.scaler.unscale_(self.optimizer)
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
            *losses, norm = torch.cat([losses, norm[None]]).tolist()  # the step's one read-back
            if math.isfinite(norm):
                self.half_changed = True
                self.optimizer.step()
                self.engine.refresh()
                self.half_changed = False
                self.scaler.update()
                return statistics.fmean(losses), norm
            scale = scale or self.scaler.state_dict()
            self.scaler.update()  # halves the loss scale
            if not (self.scaler.is_enabled() and all(map(math.isfinite, losses))):
                break
        self.scaler.load_state_dict(scale)  # a resumed run starts with the scale that worked
        raise RuntimeError(step.not_finite(self.step + 1, draw, losses, self.trained.names))

    def _accumulate(self, draw: step.Draw) -> torch.Tensor:
        """Gradients of the mean loss over the whole draw, in micro-batches; the losses (E,), on the device."""
        self.engine.zero_grad()
        size, losses = self.fallback.rung.batch, []
        count, parts = len(draw.indices), step.micro_batches(draw, self.trained.shapes, size)
        for part in parts:
            self.interrupts.check()
            seed = self.scaler.scale(torch.full((len(part),), 1 / count, device=self.device))
            losses.append(self.engine.accumulate(self._inputs(draw, part), seed))
        order = torch.tensor([place for part in parts for place in part]).argsort()
        return torch.cat(losses)[gpu.send(order, self.device)]

    def _inputs(self, draw: step.Draw, part: list[int]) -> dict[str, torch.Tensor]:
        """What `diffusion_loss` takes, for the pictures at the places `part` of `draw`."""
        latent_noise = [draw.latent_noise[k] for k in part]
        inputs = self.trained.batch(
            draw.indices[part], latent_noise, draw.dropped[part], draw.flipped[part], self.device
        )
        return inputs | {
            "timesteps": gpu.send(draw.timesteps[part], self.device),
            "noise": gpu.send(torch.stack([draw.noise[k] for k in part]), self.device),
            "alphas_cumprod": self.alphas_cumprod,
        }

    def measure(self) -> None:
        """The hold-out loss at this step, and previews."""
        with self.forecast.timed("measure"), self.interrupts.at_once():
            self.holdout = self.validation.measure(self.step, self.record)

    def save(self) -> None:
        """Writes checkpoint-<step> and its copy in the mirror, unless that is done; drops the oldest."""
        if self.folder.saved == self.step:
            return
        state = {
            "recipe": json.loads(self.recipe.to_json()),
            "sources": self.sources,
            "record": self.record,
            "scaler": self.scaler.state_dict(),
        }
        with self.forecast.timed("save"):
            self.folder.save(self.step, self.unet, self.optimizer, state)

    def finish(self) -> dict:
        """Saves the LoRA as it is now, and the record, in the run's folder; returns the record. Raises OSError."""
        record = self.record | {
            "recipe": json.loads(self.recipe.to_json()),
            "step": self.step,
            "pictures": {"training": len(self.trained), "holdout": len(self.held)},
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU",
            "peak_gib": gpu.peak_gib(),
            "adapter": str(self.folder.out / lora.FILE),
        }
        self.folder.finish(self.unet, self.recipe, record)
        return record

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.recipe.steps

    def _save_overdue(self) -> bool:
        return 0 < self.recipe.save_minutes <= (time.time() - self.folder.saved_at) / 60

    def _place(self) -> str:
        return f"step {self.step} of {self.recipe.steps}"

    def _figures(self, loss: float, norm: float) -> dict:
        return {
            "loss": loss,
            "lr": self.recipe.learning_rate(self.step - 1),
            "grad_norm": norm,
            "holdout": self.holdout,
            "images_per_second": self.recipe.pictures_per_step / self.forecast.update(),
            "peak_gib": gpu.peak_gib(),
            "left": self.forecast.seconds(self.step, self.recipe.steps),
        }


def make_optimizer(parameters, device: torch.device) -> torch.optim.Optimizer:
    """8-bit AdamW (bitsandbytes, arXiv 2110.02861) on CUDA; on the CPU torch's AdamW, the same rule in 32 bits."""
    if device.type != "cuda":
        return torch.optim.AdamW(parameters, weight_decay=1e-2, fused=True)
    try:
        from .memory.adam import AdamW8bitTogether
    except ImportError:
        raise RuntimeError("8-bit Adam needs bitsandbytes, which is not installed: pip install bitsandbytes") from None
    return AdamW8bitTogether(parameters, weight_decay=1e-2)


call_as(__name__, train)
