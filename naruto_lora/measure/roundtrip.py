"""What the VAE can't keep: pictures through it and back, at the size of training. No LoRA learns what is lost here."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .. import data, models
from ..memory import gpu

PATCH = 16  # patches along a side, for the place that suffers most
GOOD, FAIR = 30.0, 22.0  # dB


@dataclass(frozen=True)
class Kept:
    """A picture as training sees it, and as the VAE gives it back."""

    name: str
    before: Image.Image
    after: Image.Image
    db: float  # PSNR of the whole picture
    worst: float  # PSNR of the worst of its PATCH x PATCH patches
    place: tuple[int, int, int, int]  # that patch: left, top, right, bottom in px

    def sentence(self) -> str:
        """What the figures mean."""
        if self.db >= GOOD and self.worst >= FAIR - 4:
            return "kept"
        return "fine detail is lost" if self.db >= FAIR else "much is lost: lines and small faces change"


def through(examples: list[data.Example], recipe, count: int = 6) -> list[Kept]:
    """`count` examples, spread over the set, through the recipe's VAE at its resolution; frees the VAE.

    Raises ValueError for an unreadable picture, and what `models.load_vae` raises.
    """
    import torch

    device, dtype = models.device_for(recipe.precision), models.DTYPES[recipe.precision]
    some = [examples[k * len(examples) // min(count, len(examples))] for k in range(min(count, len(examples)))]
    vae, found = models.load_vae(recipe.base, recipe.vae, dtype, device), []
    try:
        for example in some:
            before = data.crop(example.image(), recipe.resolution)[0]
            with torch.no_grad():
                latents = vae.encode(data.pixels([before]).to(device, vae.dtype)).latent_dist.mean
                decoded = vae.decode(latents).sample.float().clamp(-1, 1)
            pixels = ((decoded[0].permute(1, 2, 0).cpu().numpy() + 1) * 127.5).round().astype(np.uint8)
            found.append(_kept(example.name, before, Image.fromarray(pixels)))
    finally:
        del vae
        gpu.free()
    return found


def rows(kept: list[Kept]) -> list[dict]:
    """A table: each picture's PSNR, that of its worst patch, and what that means."""
    return [
        {"picture": one.name, "kept, dB": f"{one.db:.1f}", "worst place, dB": f"{one.worst:.1f}", "": one.sentence()}
        for one in kept
    ]


def verdict(kept: list[Kept], resolution: int) -> str:
    """One sentence on all pictures."""
    middle = float(np.median([one.db for one in kept]))
    text = f"At {resolution} px the VAE keeps these pictures at {middle:.1f} dB"
    if middle >= GOOD:
        return f"{text}: what they show is there to be learnt."
    if middle >= FAIR:
        return f"{text}: fine lines and small faces are lost, and no LoRA learns them; a higher resolution keeps more."
    return f"{text}: much is lost, and no LoRA learns it; train at a higher resolution."


def _kept(name: str, before: Image.Image, after: Image.Image) -> Kept:
    one, other = (np.asarray(picture, dtype=np.float64) for picture in (before, after))
    errors = ((one - other) ** 2).mean(axis=2)
    high, wide = (max(1, math.ceil(side / PATCH)) for side in errors.shape)
    places = [(x, y, min(x + wide, errors.shape[1]), min(y + high, errors.shape[0]))
              for y in range(0, errors.shape[0], high) for x in range(0, errors.shape[1], wide)]  # fmt: skip
    worst, place = max((errors[y:bottom, x:right].mean(), (x, y, right, bottom)) for x, y, right, bottom in places)
    return Kept(name, before, after, psnr(errors.mean()), psnr(worst), place)


def psnr(error: float) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error of 8-bit pixels; 99 at most."""
    return min(99.0, 10 * math.log10(255**2 / max(error, 1e-9)))
