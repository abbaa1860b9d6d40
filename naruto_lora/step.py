"""The training step: which pictures, noise and timesteps update k sees, and the diffusion loss of a micro-batch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch


def diffusion_loss(unet, latents, prompt_embeds, pooled, time_ids, timesteps, noise, alphas_cumprod):
    """Loss (B,) of predicting `noise` in `latents` at `timesteps`: the epsilon objective of DDPM (arXiv 2006.11239).

    latents, noise (B, 4, h, w); prompt_embeds (B, L, D); pooled (B, P); time_ids (B, 6); timesteps (B,) int64;
    alphas_cumprod (1000,) fp32 on the device of the rest. The noise schedule and the loss are fp32; the U-Net
    runs in its own dtype.
    """
    alpha = alphas_cumprod[timesteps].view(-1, 1, 1, 1)  # (B, 1, 1, 1) fp32
    noisy = alpha.sqrt() * latents.float() + (1 - alpha).sqrt() * noise.float()
    added = {"text_embeds": pooled.to(unet.dtype), "time_ids": time_ids.to(unet.dtype)}
    predicted = unet(
        noisy.to(unet.dtype), timesteps, encoder_hidden_states=prompt_embeds.to(unet.dtype), added_cond_kwargs=added
    ).sample
    return (predicted.float() - noise.float()).square().mean(dim=(1, 2, 3))  # (B,)


@dataclass(frozen=True)
class Draw:
    """What one update sees, E pictures in all: a function of (seed, step) alone, on the CPU."""

    indices: np.ndarray  # (E,) places in the training set
    timesteps: torch.Tensor  # (E,) int64, one in each of E equal strata, shuffled
    noise: torch.Tensor  # (E, 4, h, w) fp32
    latent_noise: torch.Tensor  # (E, 4, h, w) fp32, for sampling the VAE's distribution
    dropped: torch.Tensor  # (E,) bool, captions replaced by zeros


def steps_per_epoch(pictures: int, recipe) -> int:
    """Updates in which each picture is seen once; the last may be short."""
    return math.ceil(pictures / recipe.pictures_per_step)


def draw(recipe, step: int, pictures: int, shape: tuple[int, int, int]) -> Draw:
    """The draw of the update that follows `step` finished ones; `shape` is a latent's (4, h, w).

    Every epoch is a permutation: each picture once, the epoch's last update short if they don't divide.
    """
    epoch, place = divmod(step, steps_per_epoch(pictures, recipe))
    order = np.random.default_rng((recipe.seed, epoch, 0)).permutation(pictures)
    indices = order[place * recipe.pictures_per_step :][: recipe.pictures_per_step]

    rng = np.random.default_rng((recipe.seed, step, 1))
    count = len(indices)
    strata = (rng.permutation(count) + rng.random(count)) / count  # one in each of `count` equal parts of [0, 1)
    dropped = rng.random(count) < recipe.caption_dropout
    generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
    noise, latent_noise = torch.randn(2, count, *shape, generator=generator)
    timesteps = torch.from_numpy((strata * 1000).astype(np.int64))
    return Draw(indices, timesteps, noise, latent_noise, torch.from_numpy(dropped))


@torch.no_grad()
def holdout_losses(unet, cache, alphas_cumprod, device, batch: int, draws: int = 8) -> torch.Tensor:
    """Losses (N, draws) of each cached picture at fixed noise and stratified fixed timesteps, on the CPU.

    The draws depend on a picture's place alone, so that two models can be compared picture by picture.
    """
    count, shape = len(cache), cache.shape
    generators = [torch.Generator().manual_seed(place) for place in range(count)]
    noise = torch.stack([torch.randn(draws, *shape, generator=g) for g in generators], dim=1)
    offset = torch.cat([torch.rand(1, generator=g) for g in generators])
    losses = torch.empty(count, draws)
    for k in range(draws):
        timesteps = ((k + offset) / draws * 1000).long().clamp(max=999)
        for start in range(0, count, batch):
            part = slice(start, min(start + batch, count))
            size = part.stop - part.start
            nothing = torch.zeros(size, dtype=torch.bool)
            inputs = cache.batch(range(part.start, part.stop), torch.zeros(size, *shape), nothing, device)
            losses[part, k] = diffusion_loss(
                unet, **inputs, timesteps=timesteps[part].to(device), noise=noise[k, part].to(device),
                alphas_cumprod=alphas_cumprod,
            ).cpu()
    return losses
