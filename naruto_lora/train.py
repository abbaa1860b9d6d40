"""The loop: a recipe in, a LoRA file and the run's record out. Also `python -m naruto_lora.train`."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
import time
from pathlib import Path

import torch

from . import cache, checkpoint, data, lora, memory, models, step
from . import recipe as recipes

MAX_GRAD_NORM = 1.0
RETRIES = 16  # times that an overflowing update is tried again, at half the loss scale each
FREE_TO_CHANGE = ("name", "legs", "save_every", "base", "vae", "dataset")  # the last three: see `Cache.fingerprint`


def train(recipe: recipes.Recipe | str, out: str | Path, cache_folder: str | Path | None = None, show=None) -> dict:
    """Trains `recipe` in the folder `out`, going on from its newest checkpoint; returns the run's record.

    Leaves in `out` pytorch_lora_weights.safetensors (diffusers), <recipe's name>.safetensors (ComfyUI, A1111) and
    run.json. `show(phase, done, total, **figures)` is
    called as it goes. Raises what `begin` raises, before anything is trained.
    """
    run = begin(recipe, out, cache_folder, show)
    run.to_the_end(show)
    return run.finish()


def begin(recipe: recipes.Recipe | str, out: str | Path, cache_folder: str | Path | None = None, show=None) -> Run:
    """A run ready for its next step: data checked and encoded, U-Net with LoRA loaded, checkpoint restored.

    Raises FileNotFoundError, PermissionError, RuntimeError or ValueError with one sentence for what is missing
    or wrong, cheapest checks first.
    """
    recipe, out = recipes.load(recipe), Path(out)
    device = models.device_for(recipe.precision)
    writable(out)
    refuse_changes(recipe, out)
    models.check_base(recipe.base, recipe.vae)
    examples, held = data.split(data.load(recipe.dataset), recipe.holdout)
    folder = Path(cache_folder) if cache_folder else out.parent / "cache"
    encoded = cache.encode(examples + held, recipe, folder, show, held=len(held))
    trained, held = encoded.part(0, len(examples)), encoded.part(len(examples), len(encoded))

    memory.free()
    memory.reset_peak()
    unet = models.load_unet(recipe.base, models.DTYPES[recipe.precision], device)
    parameters = lora.inject(unet, recipe.rank, recipe.alpha, recipe.seed)
    if memory.recompute_needed(device, recipe.resolution, recipe.batch):
        unet.enable_gradient_checkpointing()
    run = Run(recipe, out, unet, parameters, trained, held, device)
    run.resume()
    return run


class Run:
    """The state of a training run: everything that a step reads or changes."""

    def __init__(self, recipe, out, unet, parameters, trained, held, device):
        self.recipe, self.out, self.unet, self.parameters = recipe, out, unet, parameters
        self.trained, self.held, self.device = trained, held, device
        self.alphas_cumprod = models.load_alphas_cumprod(recipe.base).to(device)
        self.optimizer = make_optimizer(parameters, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "fp16")
        self.step = 0
        self.record = {"losses": [], "holdout": {}, "seconds": 0.0}

    def resume(self) -> None:
        """Goes on from the newest checkpoint in `out`, if there is one."""
        found = checkpoint.find(self.out)
        if not found:
            return
        state = checkpoint.read_state(found[-1])
        if state["data"] != self.trained.fingerprint():
            raise ValueError(
                f"the run in '{self.out}' was begun on other pictures, captions or another base model: "
                f"take those, or another folder"
            )
        checkpoint.restore(found[-1], self.unet, self.optimizer)
        self.step, self.record = state["step"], state["record"]
        self.scaler.load_state_dict(state["scaler"])

    def to_the_end(self, show=None) -> None:
        """Runs the updates that are left, with a checkpoint every `save_every` and at the end."""
        if self.step == 0:
            self._measure_holdout(show)
        begun, earlier = time.time(), self.record["seconds"]
        while self.step < self.recipe.steps:
            loss, norm = self.update()
            self.step += 1
            self.record["losses"].append(loss)
            self.record["seconds"] = earlier + time.time() - begun
            if show:
                rate = self.recipe.learning_rate(self.step - 1)
                peak = memory.peak_gib()
                show("training", self.step, self.recipe.steps, loss=loss, lr=rate, grad_norm=norm, peak_gib=peak)
            if self.step == self.recipe.steps:
                self._measure_holdout(show)
            if self.step % self.recipe.save_every == 0 or self.step == self.recipe.steps:
                self.save()

    def update(self) -> tuple[float, float]:
        """One optimizer step over `batch * accumulation` pictures; returns its mean loss and gradient norm."""
        draw = step.draw(self.recipe, self.step, self.trained.shapes)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate(self.step)
        for _ in range(RETRIES):
            loss = self._accumulate(draw)
            self.scaler.unscale_(self.optimizer)
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
            loss, norm = torch.stack([loss, norm]).tolist()  # the step's one read-back
            if math.isfinite(norm):
                self.optimizer.step()
                self.scaler.update()
                return loss, norm
            if not self.scaler.is_enabled():
                break
            self.scaler.update()  # halves the loss scale: the same step is tried again
        raise RuntimeError(
            f"the gradients of step {self.step} are not finite (loss {loss}); the run stops before harm is done, "
            f"its last checkpoint is whole: lower the learning rate or look at the pictures of this step"
        )

    def _accumulate(self, draw: step.Draw) -> torch.Tensor:
        """Gradients of the mean loss over the whole draw, in micro-batches; returns that loss, on the device."""
        self.optimizer.zero_grad(set_to_none=True)
        total, count = torch.zeros((), device=self.device), len(draw.indices)
        for part in step.micro_batches(draw, self.trained.shapes, self.recipe.batch):
            noise, latent_noise = ([rows[place] for place in part] for rows in (draw.noise, draw.latent_noise))
            inputs = self.trained.batch(
                draw.indices[part], latent_noise, draw.dropped[part], draw.flipped[part], self.device
            )
            with self._autocast():
                losses = step.diffusion_loss(
                    self.unet, **inputs, timesteps=draw.timesteps[part].to(self.device),
                    noise=torch.stack(noise).to(self.device), alphas_cumprod=self.alphas_cumprod,
                )
            loss = losses.sum() / count
            self.scaler.scale(loss).backward()
            total += loss.detach()
        return total

    def _autocast(self):
        if self.recipe.precision == "fp16":
            return torch.autocast(self.device.type, dtype=torch.float16)
        return contextlib.nullcontext()

    def _measure_holdout(self, show) -> None:
        """Hold-out losses at this step, each picture's mean over the draws, unless they are known."""
        if len(self.held) == 0 or str(self.step) in self.record["holdout"]:
            return
        with self._autocast():
            losses = step.holdout_losses(self.unet, self.held, self.alphas_cumprod, self.device, self.recipe.batch)
        self.record["holdout"][str(self.step)] = losses.mean(dim=1).tolist()
        if show:
            show(f"hold-out loss {losses.mean():.4f} at step {self.step}, pictures", len(self.held), len(self.held))

    def save(self) -> Path:
        state = {
            "recipe": json.loads(self.recipe.to_json()),
            "data": self.trained.fingerprint(),
            "record": self.record,
            "scaler": self.scaler.state_dict(),
        }
        return checkpoint.save(self.out, self.step, self.unet, self.optimizer, state)

    def finish(self) -> dict:
        """Saves the adapter and the record in `out`; returns the record."""
        lora.save(self.unet, self.out)
        lora.save_kohya(self.unet, self.out / f"{self.recipe.name}.safetensors", self.recipe.alpha)
        record = self.record | {
            "recipe": json.loads(self.recipe.to_json()),
            "step": self.step,
            "pictures": {"training": len(self.trained), "holdout": len(self.held)},
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU",
            "peak_gib": memory.peak_gib(),
            "adapter": str(self.out / lora.FILE),
        }
        (self.out / "run.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
        return record


def refuse_changes(recipe: recipes.Recipe, out: Path) -> None:
    """Raises ValueError if the run in `out` was begun with another recipe, naming the field and both values."""
    found = checkpoint.find(out)
    if not found:
        return
    state, new = checkpoint.read_state(found[-1]), json.loads(recipe.to_json())
    for field, old in state["recipe"].items():
        if field not in FREE_TO_CHANGE and old != new[field]:
            raise ValueError(
                f"the run in '{out}' was begun with {field} {old!r}, not {new[field]!r}: "
                f"take that value, or another folder"
            )
    if state["step"] > recipe.steps:
        raise ValueError(
            f"the run in '{out}' is at step {state['step']}, past the {recipe.steps} of recipe '{recipe.name}': "
            f"take another folder"
        )


def make_optimizer(parameters, device: torch.device) -> torch.optim.Optimizer:
    """8-bit AdamW (bitsandbytes, arXiv 2110.02861) on CUDA; on the CPU torch's AdamW, the same rule in 32 bits."""
    if device.type != "cuda":
        return torch.optim.AdamW(parameters, weight_decay=1e-2)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise RuntimeError("8-bit Adam needs bitsandbytes, which is not installed: pip install bitsandbytes") from None
    return AdamW8bit(parameters, weight_decay=1e-2)


def writable(folder: Path) -> None:
    """Makes `folder`. Raises PermissionError if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.write_bytes(b"1")
        os.remove(probe)
    except OSError as error:
        reason = error.strerror or error
        raise PermissionError(f"can't write to the output folder '{folder}' ({reason}); choose another") from None


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    from .report import Progress

    parser = argparse.ArgumentParser(prog="python -m naruto_lora.train", description="Trains a recipe.")
    parser.add_argument("recipe", help=f"{', '.join(recipes.RECIPES)}, or a .json or .toml file")
    parser.add_argument("--out", type=Path, required=True, help="the run's folder; a run that is in it goes on")
    options = parser.parse_args(arguments)
    try:
        record = train(options.recipe, options.out, show=Progress())
    except (OSError, RuntimeError, ValueError) as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    print(record["adapter"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
