"""The loop: a recipe in, a LoRA file and the run's record out. Also `python -m naruto_lora.train`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import shutil
import statistics
import sys
import time
from pathlib import Path

import torch
from safetensors import SafetensorError

from . import cache, checkpoint, data, files, lean, lora, memory, models, pipeline, session, step
from . import plan as plans
from . import recipe as recipes
from .progress import Progress

MAX_GRAD_NORM = 1.0
RETRIES = 16  # times that an overflowing update is tried again, at half the loss scale each
FREE_TO_CHANGE = (  # legs, base, vae and dataset are looked at by what they are, not by how they are written
    "name", "legs", "save_every", "save_minutes", "measure_every", "previews", "max_minutes", "expect",
    "batch", "accumulation", "base", "vae", "dataset",
)  # fmt: skip


def train(recipe, out: str | Path, cache_folder: str | Path | None = None, show=None, mirror=None) -> dict:
    """Trains `recipe` in the folder `out`, going on from its newest checkpoint; returns the run's record.

    Leaves in `out` pytorch_lora_weights.safetensors (diffusers), <recipe's name>.safetensors (ComfyUI, A1111) and
    run.json. `mirror` is a second folder (Google Drive) for all that must outlive this machine. As it goes it calls
    `show(phase, done, total, **figures)` and, for lines worth keeping, `show.note(text)`. Raises what `begin`
    raises, before anything is trained, and what `Run.to_the_end` does.
    """
    run = begin(recipe, out, cache_folder, show, mirror)
    run.to_the_end(show)
    return run.finish(show)


def begin(recipe, out: str | Path, cache_folder=None, show=None, mirror=None, rungs=None) -> Run:
    """A run ready for its next step: data checked and encoded, U-Net with LoRA loaded, checkpoint restored.

    `rungs` are ways to compute it (`memory.Rung`), each taking less memory than the one before; without them
    `plan.plan` chooses for this machine. Raises FileNotFoundError, OSError, RuntimeError or ValueError with one
    sentence for what is missing or wrong, cheapest checks first.
    """
    begun, recipe, out = time.time(), recipes.load(recipe), Path(out)
    device = models.device_for(recipe.precision)
    files.writable(out)
    mirror = _ready(mirror, show)
    models.check_base(recipe.base, recipe.vae)
    examples, held = data.split(data.load(recipe.dataset), recipe.holdout)
    checkpoint.tidy(out)
    each = [path for path in (_newest(place, show) for place in (out, mirror) if place) if path]
    sources = sources_of(recipe, examples, held)
    for path in each:  # the older one too: another run's checkpoints would be rotated away
        refuse_changes(recipe, sources, checkpoint.read_state(path), path.parent)
    memory.free()
    memory.expandable()
    card = memory.Card.here(device)  # before anything is on it
    if rungs is None:
        done = max((checkpoint.step_of(path) for path in each), default=0)
        rungs = _rungs(recipe, card, recipe.steps - done, show)
    folder = Path(cache_folder) if cache_folder else out.parent / "cache"
    copies = mirror and mirror.parent / "cache"
    encoded = cache.encode(examples + held, recipe, folder, show, copies, held=len(held))
    trained, held = encoded.part(0, len(examples)), encoded.part(len(examples), len(encoded))

    memory.free()
    memory.reset_peak()
    unet = models.load_unet(recipe.base, models.DTYPES[recipe.precision], device)
    parameters = lora.inject(unet, recipe.rank, recipe.alpha, recipe.seed)
    checkpoint.enough_disk(out, parameters)
    if rungs[0].lean and (reason := lean.unsupported(unet)):
        files.tell(show, f"the plain step, not the lean one: {reason}")
        rungs = _rungs(recipe, card, 0, show, fast=False)
    run = Run(recipe, out, unet, parameters, trained, held, device, sources, mirror, rungs)
    run.begun = begun
    for path in sorted(each, key=checkpoint.step_of, reverse=True):
        try:
            run.resume(path, show)
            break
        except OSError as error:  # a mirror that can't be read after all
            files.tell(show, f"{path} can't be copied ({error.strerror or error})")
    return run


def _rungs(recipe, card: memory.Card, steps_left: int, show, fast: bool = True) -> list[memory.Rung]:
    """The ways to compute `recipe` on this machine, the chosen one first; says which. On a CPU the plain step."""
    made = plans.plan(recipe, card, steps_left, lean=fast and card.cuda)
    if card.cuda:
        files.tell(show, made.sentence())
    return made.rungs


class Run:
    """The state of a training run: everything that a step reads or changes."""

    def __init__(self, recipe, out, unet, parameters, trained, held, device, sources=None, mirror=None, rungs=None):
        self.recipe, self.out, self.unet, self.parameters = recipe, out, unet, parameters
        self.trained, self.held, self.device = trained, held, device
        self.sources, self.mirror = sources or {}, mirror
        self.alphas_cumprod = models.load_alphas_cumprod(recipe.base).to(device)
        self.optimizer = make_optimizer(parameters, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "fp16")
        self.step, self.saved, self.saved_at = 0, None, time.time()  # updates done; those of the last checkpoint
        self.record = {"losses": [], "holdout": {}, "best_step": None, "seconds": 0.0}
        self.begun, self.forecast, self.interrupts = time.time(), session.Forecast(recipe), session.Interrupts()
        self.stepping = False  # inside the optimizer's step, where weights are half changed
        self.warned, self.holdout = set(), None  # what was told once; the newest mean hold-out loss
        self.rungs = list(rungs or [memory.Rung(recipe.batch, lean=False)])  # the first is in use
        self.engine = None
        self._set_up(None)

    def resume(self, found: Path, show=None) -> None:
        """Goes on from the checkpoint `found`; the mirror's comes into `out` first, with the best one and previews."""
        state = checkpoint.read_state(found)
        if found.parent != self.out:
            checkpoint.fetch(found, self.out)
            with contextlib.suppress(OSError):  # what is good to have, but not needed
                self._fetch_others(found, state["record"]["best_step"])
        checkpoint.restore(self.out / found.name, self.unet, self.optimizer)
        self.engine.refresh()
        self.step, self.record, self.saved = state["step"], state["record"], state["step"]
        self.scaler.load_state_dict(state["scaler"])
        self._to_mirror(self.out / found.name, show)
        files.tell(show, f"goes on from {found}, at step {self.step} of {self.recipe.steps}")

    def _fetch_others(self, found: Path, best: int | None) -> None:
        """Copies the mirror's best checkpoint and its previews."""
        path = found.with_name(f"checkpoint-{best}")
        if path != found and checkpoint.problem(path) is None:
            checkpoint.fetch(path, self.out)
        (self.out / "previews").mkdir(exist_ok=True)
        for path in (found.parent / "previews").glob("step-*.jpg"):
            files.copy_whole(path, self.out / "previews" / path.name)

    def to_the_end(self, show=None) -> None:
        """Runs the updates that are left, or as many as `max_minutes` allow.

        Ctrl-C, a kernel's interrupt and SIGTERM save a checkpoint first; then KeyboardInterrupt or SystemExit is
        raised. Raises RuntimeError for a step that isn't finite, OSError for a full disk.
        """
        with self.interrupts:
            try:
                self._loop(show)
            except session.Interrupted:
                self.save(show)
                files.tell(show, f"interrupted at step {self.step} of {self.recipe.steps}, {self._kept()}")
        self.interrupts.pass_on()

    def _loop(self, show) -> None:
        earlier = self.record["seconds"] - (time.time() - self.begun)
        if self._due(self.recipe.measure_every):  # at the start, or where an interrupt cut a measurement short
            self._measure(show)
        calibrated = self.step + session.CALIBRATION
        while self.step < self.recipe.steps:
            if self._over_budget():
                self.save(show)
                minutes = f"max_minutes = {self.recipe.max_minutes:g}"
                files.tell(show, f"stopped by {minutes} at step {self.step} of {self.recipe.steps}, {self._kept()}")
                return
            with self.forecast.timed("update"):
                loss, norm = self._update_or_save(show)
            for text in self.engine.news:
                self._warn_once(text, show)
            self.step += 1
            self.record["losses"].append(loss)
            self.record["seconds"] = earlier + time.time() - self.begun
            if show:
                show("training", self.step, self.recipe.steps, **self._figures(loss, norm))
            if self.step == calibrated < self.recipe.steps:
                files.tell(show, self.forecast.sentence(self.step, self._budget_left()))
            measured = self._due(self.recipe.measure_every)
            if measured:
                self._measure(show)
            if measured or self._due(self.recipe.save_every) or self._save_overdue():
                self.save(show)

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.recipe.steps

    def _save_overdue(self) -> bool:
        return 0 < self.recipe.save_minutes <= (time.time() - self.saved_at) / 60

    def _figures(self, loss: float, norm: float) -> dict:
        return {
            "loss": loss,
            "lr": self.recipe.learning_rate(self.step - 1),
            "grad_norm": norm,
            "holdout": self.holdout,
            "images_per_second": self.recipe.pictures_per_step / self.forecast.update(),
            "peak_gib": memory.peak_gib(),
            "left": self.forecast.seconds(self.step, self.recipe.steps),
        }

    def _budget_left(self) -> float:
        """Seconds of `max_minutes` that are left."""
        budget = self.recipe.max_minutes * 60 or math.inf
        return budget - (time.time() - self.begun)

    def _over_budget(self) -> bool:
        """Whether the next update would end past `max_minutes`; each session does at least one."""
        return self.forecast.update() > 0 and self._budget_left() < self.forecast.update() + self.forecast.mean("save")

    def _kept(self) -> str:
        return f"kept in '{self.out / f'checkpoint-{self.saved}'}': run it again to go on"

    def _update_or_save(self, show) -> tuple[float, float]:
        try:
            return self.update(show)
        except RuntimeError:  # out of memory, or not finite: what is trained is kept, if it isn't half changed
            if not self.stepping:
                with contextlib.suppress(OSError):
                    self.save(show)
            raise

    def update(self, show=None) -> tuple[float, float]:
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
            losses = self._within_memory(functools.partial(self._accumulate, draw), show)
            self.scaler.unscale_(self.optimizer)
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
            *losses, norm = torch.cat([losses, norm[None]]).tolist()  # the step's one read-back
            if math.isfinite(norm):
                self.stepping = True
                self.optimizer.step()
                self.engine.refresh()
                self.stepping = False
                self.scaler.update()
                return statistics.fmean(losses), norm
            scale = scale or self.scaler.state_dict()
            self.scaler.update()  # halves the loss scale
            if not (self.scaler.is_enabled() and all(map(math.isfinite, losses))):
                break
        self.scaler.load_state_dict(scale)  # a run that goes on from here starts with the scale that worked
        raise RuntimeError(self._not_finite(draw, losses))

    def _not_finite(self, draw: step.Draw, losses: list[float]) -> str:
        """What to say of a step that can't be taken: its pictures and timesteps, those at fault if they are known."""
        wrong = [k for k, loss in enumerate(losses) if not math.isfinite(loss)]
        what, places = ("loss is", wrong) if wrong else ("gradients are", range(len(losses)))
        named = [f"'{self.trained.names[draw.indices[k]]}' (timestep {int(draw.timesteps[k])})" for k in places[:4]]
        named += [f"{len(places) - 4} more"] if len(places) > 4 else []
        return (
            f"step {self.step + 1}: the {what} not finite for {' and '.join(named)}; the run stops before harm is "
            f"done: look at these pictures, or take a lower learning rate from here"
        )

    def _within_memory(self, compute, show):
        """`compute()`, again one rung further down each time that the GPU's memory runs out."""
        released = False
        while True:
            try:
                return compute()
            except RuntimeError as error:
                if not memory.is_full(error):
                    raise
                reason = str(error).split(". ")[0]
            released = not released and self.engine.release()  # outside of `except`, which keeps the failed pass alive
            memory.free()
            if not released:  # or it was not enough
                self._step_down(reason, show)

    def _step_down(self, reason: str, show) -> None:
        """Puts the next rung's engine in the place of this one's. Raises RuntimeError if there is none that fits."""
        self.engine = None  # else its copies of the weights would stand beside the next one's
        self.rungs.pop(0)
        self._set_up(reason)
        files.tell(show, f"the GPU's memory is full in step {self.step + 1}: it goes on with {self.rungs[0].say()}")

    def _set_up(self, reason: str | None) -> None:
        """Makes the engine of the first rung that can be; forgets those before it."""
        while self.engine is None:
            memory.free()
            if not self.rungs:
                raise RuntimeError(
                    f"step {self.step + 1} does not fit in the GPU's memory ({reason}): end other programs that use "
                    f"the GPU, or take a smaller resolution; what is trained is kept, run it again to go on"
                )
            try:
                self.engine = lean.make_engine(self.unet, self.parameters, self.rungs[0])
            except RuntimeError as error:
                if not memory.is_full(error):
                    raise
                reason = str(error).split(". ")[0]
                self.rungs.pop(0)
        memory.free()

    def _accumulate(self, draw: step.Draw) -> torch.Tensor:
        """Gradients of the mean loss over the whole draw, in micro-batches; the losses (E,), on the device."""
        self.engine.zero_grad()
        count, parts, losses = len(draw.indices), step.micro_batches(draw, self.trained.shapes, self.rungs[0].batch), []
        for part in parts:
            self.interrupts.check()
            seed = self.scaler.scale(torch.full((len(part),), 1 / count, device=self.device))
            losses.append(self.engine.accumulate(self._inputs(draw, part), seed))
        order = torch.tensor([place for part in parts for place in part]).argsort()
        return torch.cat(losses)[memory.send(order, self.device)]

    def _inputs(self, draw: step.Draw, part: list[int]) -> dict[str, torch.Tensor]:
        """What `diffusion_loss` takes, for the pictures at the places `part` of `draw`."""
        latent_noise = [draw.latent_noise[k] for k in part]
        inputs = self.trained.batch(
            draw.indices[part], latent_noise, draw.dropped[part], draw.flipped[part], self.device
        )
        return inputs | {
            "timesteps": memory.send(draw.timesteps[part], self.device),
            "noise": memory.send(torch.stack([draw.noise[k] for k in part]), self.device),
            "alphas_cumprod": self.alphas_cumprod,
        }

    def _measure(self, show) -> None:
        """Hold-out losses (N, draws) and previews at this step; marks the best step so far."""
        with self.forecast.timed("measure"), self.interrupts.at_once():
            known = self.record["holdout"]
            if len(self.held) and str(self.step) not in known:
                losses = self._within_memory(functools.partial(self._holdout_losses, show), show)
                known[str(self.step)] = losses.tolist()
            means = {int(k): statistics.fmean(map(statistics.fmean, values)) for k, values in known.items()}
            self.holdout = means.get(self.step)
            self.record["best_step"] = min((k for k in means if k), key=means.get, default=None)
            self._preview(show)

    def _holdout_losses(self, show) -> torch.Tensor:
        with self.engine.context():
            return step.holdout_losses(
                self.unet, self.held, self.alphas_cumprod, self.device, self.rungs[0].batch, show=show
            )

    def _preview(self, show) -> None:
        """Draws the first hold-out captions as the model is now, into `out`/previews; a failure stops no training."""
        prompts = self.held if len(self.held) else self.trained
        count = min(self.recipe.previews, len(prompts))
        paths = [self.out / "previews" / f"step-{self.step:06d}-{k}.jpg" for k in range(count)]
        if all(path.exists() for path in paths):
            return
        self.engine.release()
        memory.free()
        try:
            with self.engine.context():
                pictures = pipeline.preview(self.unet, self.recipe, prompts.prompts_of(range(count), self.device))
            paths[0].parent.mkdir(exist_ok=True)
            for path, picture in zip(paths, pictures, strict=True):
                files.replace(path, lambda temporary, drawn=picture: drawn.save(temporary, "JPEG", quality=90))
                self._to_mirror(path, show)
        except session.Interrupted:
            raise
        except Exception as error:  # whatever it is: hours of training are worth more
            self._warn_once(f"no previews ({type(error).__name__}: {str(error)[:100]}); the run goes on", show)

    def save(self, show=None) -> None:
        """Writes checkpoint-<step> and its copy in the mirror, unless that is done; drops the oldest."""
        if self.saved == self.step:
            return
        with self.forecast.timed("save"):
            path = self._write(
                {
                    "recipe": json.loads(self.recipe.to_json()),
                    "sources": self.sources,
                    "record": self.record,
                    "scaler": self.scaler.state_dict(),
                }
            )
            self.saved, self.saved_at = self.step, time.time()
            checkpoint.rotate(self.out, self.step, self.record["best_step"])
            self._to_mirror(path, show)

    def _write(self, state: dict) -> Path:
        try:
            return checkpoint.save(self.out, self.step, self.unet, self.optimizer, state)
        except OSError:  # a full disk: older checkpoints make room
            checkpoint.rotate(self.out, self.saved or 0, self.record["best_step"], keep=1)
        try:
            return checkpoint.save(self.out, self.step, self.unet, self.optimizer, state)
        except OSError as error:
            raise OSError(
                f"checkpoint-{self.step} can't be written to '{self.out}' ({error}), the newest there is of step "
                f"{self.saved}: make room and run it again to go on from it"
            ) from None

    def _to_mirror(self, path: Path, show) -> None:
        """Copies a checkpoint or a file of `out` to its place in the mirror. What goes wrong there is told, once."""
        if not self.mirror:
            return
        try:
            if path.is_dir():
                for each in {path, path.with_name(f"checkpoint-{self.record['best_step']}")}:
                    if each.is_dir() and checkpoint.problem(self.mirror / each.name):
                        checkpoint.fetch(each, self.mirror)
                checkpoint.rotate(self.mirror, self.step, self.record["best_step"], emptied=True)
            else:
                target = self.mirror / path.relative_to(self.out)
                target.parent.mkdir(exist_ok=True)
                files.copy_whole(path, target)
        except OSError as error:
            self._warn_once(f"no copy in the mirror '{self.mirror}' ({error.strerror or error}); the run goes on", show)

    def _warn_once(self, text: str, show) -> None:
        if text not in self.warned:
            self.warned.add(text)
            files.tell(show, text)

    def finish(self, show=None) -> dict:
        """Saves the adapter as it is now, and the record, in `out`; returns the record. Raises OSError."""
        record = self.record | {
            "recipe": json.loads(self.recipe.to_json()),
            "step": self.step,
            "pictures": {"training": len(self.trained), "holdout": len(self.held)},
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU",
            "peak_gib": memory.peak_gib(),
            "adapter": str(self.out / lora.FILE),
        }
        try:
            for file in self._write_adapter(record):
                self._to_mirror(file, show)
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"the LoRA can't be written to '{self.out}' ({error}): make room; its weights are {self._kept()}"
            ) from None
        return record

    def _write_adapter(self, record: dict) -> list[Path]:
        """The adapter's two files and run.json, written beside and then put into `out`."""
        beside = self.out / ".writing-adapter"
        shutil.rmtree(beside, ignore_errors=True)  # of a killed end: its files may be cut short
        beside.mkdir()
        lora.save(self.unet, beside)
        lora.save_kohya(self.unet, beside / f"{self.recipe.name}.safetensors", self.recipe.alpha)
        (beside / "run.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
        for file in beside.iterdir():
            files.flush(file)
        written = [file.replace(self.out / file.name) for file in sorted(beside.iterdir())]
        beside.rmdir()
        return written


def sources_of(recipe: recipes.Recipe, examples: list[data.Example], held: list[data.Example]) -> dict[str, str]:
    """What the run depends on beside the recipe's numbers, told by content and not by place."""
    return {
        "dataset": f"{len(examples)} training pictures, {data.fingerprint(examples)}",
        "holdout": f"{len(held)} pictures, {data.fingerprint(held)}",
        "base": models.identity(recipe.base)[:16],
        "vae": models.identity(recipe.vae or recipe.base)[:16],
    }


def refuse_changes(recipe: recipes.Recipe, sources: dict, state: dict, folder: Path) -> None:
    """Raises ValueError if what is trained already was trained otherwise, naming the field and both values."""

    def same(field: str, old, new) -> None:
        if old != new:
            raise ValueError(
                f"the run in '{folder}' was begun with {field} {old!r}, not {new!r}: take that, or another folder"
            )

    if "sources" not in state:
        raise ValueError(f"the run in '{folder}' was begun by an earlier version of naruto_lora: take another folder")
    new, done = json.loads(recipe.to_json()), state["step"]
    old = {f.name: f.default for f in dataclasses.fields(recipe)} | state["recipe"]
    for field, value in new.items():
        if field not in FREE_TO_CHANGE:
            same(field, old[field], value)
    same("batch * accumulation", old["batch"] * old["accumulation"], recipe.pictures_per_step)
    for field, value in state["sources"].items():
        if value != sources[field]:
            same(field, f"{old[field]} ({value})", f"{new[field]} ({sources[field]})")
    if done > recipe.steps:
        raise ValueError(
            f"the run in '{folder}' is at step {done}, past the {recipe.steps} of recipe '{recipe.name}': "
            f"take another folder"
        )
    before = recipe.replace(legs=old["legs"])
    for k in range(done):
        rates = (float(f"{plan.learning_rate(k):.9g}") for plan in (before, recipe))
        same(f"legs whose learning rate in step {k + 1} is", *rates)


def _newest(place: Path, show) -> Path | None:
    try:
        return checkpoint.newest([place], show)
    except OSError as error:
        files.tell(show, f"'{place}' can't be read ({error.strerror or error}); what is there is passed over")
        return None


def _ready(mirror: str | Path | None, show) -> Path | None:
    """The mirror as a path, made if its parent is there; tells of one that can't be used."""
    if not mirror:
        return None
    try:
        Path(mirror).mkdir(exist_ok=True)
        files.writable(Path(mirror))
        checkpoint.tidy(Path(mirror))
    except OSError as error:
        reason = error.strerror or error
        files.tell(show, f"the mirror '{mirror}' can't be used ({reason}); it is tried again at each checkpoint")
    return Path(mirror)


def make_optimizer(parameters, device: torch.device) -> torch.optim.Optimizer:
    """8-bit AdamW (bitsandbytes, arXiv 2110.02861) on CUDA; on the CPU torch's AdamW, the same rule in 32 bits."""
    if device.type != "cuda":
        return torch.optim.AdamW(parameters, weight_decay=1e-2, fused=True)
    try:
        from .adam import AdamW8bitTogether
    except ImportError:
        raise RuntimeError("8-bit Adam needs bitsandbytes, which is not installed: pip install bitsandbytes") from None
    return AdamW8bitTogether(parameters, weight_decay=1e-2)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m naruto_lora.train", description="Trains a recipe.")
    parser.add_argument("recipe", help=f"{', '.join(recipes.RECIPES)}, or a .json or .toml file")
    parser.add_argument("--out", type=Path, required=True, help="the run's folder; a run that is in it goes on")
    parser.add_argument("--mirror", type=Path, help="a second folder for the checkpoints, on another disk")
    options = parser.parse_args(arguments)
    try:
        record = train(options.recipe, options.out, show=Progress(), mirror=options.mirror)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(record["adapter"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
