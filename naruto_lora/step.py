"""The training step: which pictures, noise and timesteps update k sees, and the diffusion loss of a micro-batch."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass

import numpy as np
import torch


def diffusion_loss(unet, latents, prompt_embeds, pooled, time_ids, timesteps, noise, alphas_cumprod):
    """Loss (B,) of predicting `noise` in `latents` at `timesteps`: the epsilon objective of DDPM (arXiv 2006.11239).

    latents, noise (B, 4, h, w); prompt_embeds (B, L, D); pooled (B, P); time_ids (B, 6); timesteps (B,) int64;
    alphas_cumprod (1000,) fp32, all on one device. The noise schedule and the loss are fp32; the U-Net runs in its
    own dtype.
    """
    dtype = next(unet.parameters()).dtype  # faster than diffusers' `unet.dtype`, which visits every module
    alpha = alphas_cumprod[timesteps].view(-1, 1, 1, 1)  # (B, 1, 1, 1) fp32
    noisy = alpha.sqrt() * latents.float() + (1 - alpha).sqrt() * noise.float()
    added = {"text_embeds": pooled.to(dtype), "time_ids": time_ids.to(dtype)}
    predicted = unet(
        noisy.to(dtype), timesteps, encoder_hidden_states=prompt_embeds.to(dtype), added_cond_kwargs=added
    ).sample
    return (predicted.float() - noise.float()).square().mean(dim=(1, 2, 3))  # (B,)


class Plain:
    """The plain engine of a run's micro-batches: the U-Net with peft's LoRA in fp32, or in fp16 under autocast.

    `memory.lean.Lean` computes the same with less memory and fewer kernels.
    """

    notes = ()  # messages for the user: none

    def __init__(self, unet, parameters, recompute: bool = False):
        self.unet, self.parameters = unet, parameters
        self.half = next(unet.parameters()).dtype == torch.float16
        unet.enable_gradient_checkpointing() if recompute else unet.disable_gradient_checkpointing()

    def context(self):
        """The context that the U-Net must run in, wherever it is used."""
        if self.half:
            return torch.autocast(self.unet.device.type, dtype=torch.float16)
        return contextlib.nullcontext()

    def accumulate(self, inputs: dict[str, torch.Tensor], seed: torch.Tensor) -> torch.Tensor:
        """Losses (B,) of a micro-batch (inputs of `diffusion_loss`); adds the gradients of seed (B,) * losses."""
        with self.context():
            losses = diffusion_loss(self.unet, **inputs)
        losses.backward(seed)
        return losses.detach()

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def refresh(self) -> None:
        """To call after each change of the LoRA weights; nothing here depends on them."""

    def release(self) -> bool:
        """Frees GPU memory for others. False: this engine holds nothing between micro-batches."""
        return False


@dataclass(frozen=True)
class Draw:
    """The random inputs of one update, for its E pictures: they depend only on (seed, step). On the CPU."""

    indices: np.ndarray  # (E,) positions in the training set
    timesteps: torch.Tensor  # (E,) int64, one from each of E equal strata, shuffled
    noise: list[torch.Tensor]  # E tensors (4, h, w), fp32
    latent_noise: list[torch.Tensor]  # E tensors (4, h, w), fp32, to sample the VAE's distribution
    dropped: torch.Tensor  # (E,) bool, captions replaced by zeros
    flipped: torch.Tensor  # (E,) bool, pictures mirrored


def steps_per_epoch(pictures: int, recipe) -> int:
    """Updates that see each picture once; the last may be short."""
    return math.ceil(pictures / recipe.pictures_per_step)


def draw(recipe, step: int, shapes: list[tuple[int, int, int]]) -> Draw:
    """The random inputs of the update after `step` finished ones; `shapes` are the training latents' (4, h, w).

    An epoch is a permutation: it sees each picture once, and its last update may be short.
    """
    epoch, place = divmod(step, steps_per_epoch(len(shapes), recipe))
    order = np.random.default_rng((recipe.seed, epoch, 0)).permutation(len(shapes))
    indices = order[place * recipe.pictures_per_step :][: recipe.pictures_per_step]

    rng = np.random.default_rng((recipe.seed, step, 1))
    count = len(indices)
    strata = (rng.permutation(count) + rng.random(count)) / count  # one in each of `count` equal parts of [0, 1)
    dropped = rng.random(count) < recipe.caption_dropout
    generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
    flipped = rng.random(count) < (0.5 if recipe.flip else 0.0)
    sizes = [math.prod(shapes[i]) for i in indices]
    noise, latent_noise = (
        [part.view(shapes[i]) for part, i in zip(flat.split(sizes), indices, strict=True)]
        for flat in torch.randn(2, sum(sizes), generator=generator)
    )
    timesteps = torch.from_numpy((strata * 1000).astype(np.int64))
    return Draw(indices, timesteps, noise, latent_noise, torch.from_numpy(dropped), torch.from_numpy(flipped))


def micro_batches(draw: Draw, shapes: list[tuple[int, int, int]], size: int) -> list[list[int]]:
    """Positions in the draw, grouped into micro-batches of one shape and at most `size` pictures."""
    return group_by_shape([shapes[i] for i in draw.indices], size)


def group_by_shape(shapes, size: int) -> list[list[int]]:
    """Positions in `shapes`, in groups of one shape and at most `size`; each group in order."""
    groups: dict[tuple, list[int]] = {}
    for position, shape in enumerate(shapes):
        groups.setdefault(shape, []).append(position)
    return [group[start : start + size] for group in groups.values() for start in range(0, len(group), size)]


def describe_not_finite(number: int, draw: Draw, losses: list[float], names: tuple[str, ...]) -> str:
    """The message for update `number` (from 1) whose loss or gradients are not finite.

    It lists the pictures with such a loss, and their timesteps; all of them if only the gradients are not finite.
    """
    wrong = [k for k, loss in enumerate(losses) if not math.isfinite(loss)]
    what, which = ("loss is", wrong) if wrong else ("gradients are", range(len(losses)))
    named = [f"'{names[draw.indices[k]]}' (timestep {int(draw.timesteps[k])})" for k in which[:4]]
    named += [f"{len(which) - 4} more"] if len(which) > 4 else []
    return (
        f"step {number}: the {what} not finite for {' and '.join(named)}; the run stops and keeps the LoRA as "
        f"it was before this step: check these pictures, or use a lower learning rate from here"
    )
