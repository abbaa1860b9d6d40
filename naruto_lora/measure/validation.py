"""Validation: the hold-out loss and the previews of a model in training."""

from __future__ import annotations

import functools
import io
import statistics

import torch

from .. import files, models, pipeline, step
from ..memory import gpu


class Validation:
    """Measures a run's model and draws previews; the run's `record` has "holdout" {step: losses} and "best_step".

    `fallback` runs the calculation, `folder` (a `checkpoint.RunFolder`) keeps the previews, `show` is a
    `progress.Listener`.
    """

    def __init__(self, recipe, unet, trained, held, alphas_cumprod, fallback, folder, show):
        self.recipe, self.unet, self.trained, self.held = recipe, unet, trained, held
        self.alphas_cumprod, self.fallback, self.folder, self.show = alphas_cumprod, fallback, folder, show

    def measure(self, done: int, record: dict) -> float | None:
        """Adds the hold-out losses after `done` updates to `record`, marks the best step, draws the previews.

        Returns the mean hold-out loss, or None without a hold-out.
        """
        measured = dict(record["holdout"])
        if len(self.held) and str(done) not in measured:
            measured[str(done)] = self.fallback.run(self._losses, done + 1).tolist()
        means = {int(k): statistics.fmean(map(statistics.fmean, values)) for k, values in measured.items()}
        best = min((k for k in means if k), key=means.__getitem__, default=None)
        record.update(holdout=measured, best_step=best)  # both at once: an interrupt can come between two lines
        self.preview(done)
        return means.get(done)

    def _losses(self) -> torch.Tensor:
        with self.fallback.engine.context():
            batch, device = self.fallback.rung.batch, self.unet.device
            return holdout_losses(self.unet, self.held, self.alphas_cumprod, device, batch, show=self.show)

    def preview(self, done: int) -> None:
        """Draws the first hold-out captions with the present model into the run's previews; no failure ends the run."""
        source = self.held if len(self.held) else self.trained
        count = min(self.recipe.previews, len(source))
        paths = [self.folder.out / "previews" / f"step-{done:06d}-{k}.jpg" for k in range(count)]
        if all(path.exists() for path in paths):
            for path in paths:  # a kill may have come before their copies
                self.folder.mirror_file(path)
            return
        self.fallback.engine.release()
        gpu.free()
        try:
            with self.fallback.engine.context():
                prompts = source.prompts_of(range(count), self.unet.device)
                pictures = draw_previews(self.unet, self.recipe, prompts)
            paths[0].parent.mkdir(exist_ok=True)
            for path, picture in zip(paths, pictures, strict=True):
                files.replace(path, functools.partial(_save_jpeg, picture))
                self.folder.mirror_file(path)
        except Exception as error:  # of any kind: it must not end hours of training
            self.show.once(f"no previews ({type(error).__name__}: {str(error)[:100]}); the run continues")


def _save_jpeg(picture, path) -> None:
    buffer = io.BytesIO()  # Pillow's own write takes a JPEG cut short by a full disk for a whole one
    picture.save(buffer, "JPEG", quality=90)
    path.write_bytes(buffer.getvalue())


@torch.no_grad()
def holdout_losses(unet, cache, alphas_cumprod, device, batch: int, draws: int = 4, show=None) -> torch.Tensor:
    """Losses (N, draws) of each cached picture, unflipped, at fixed noise and fixed stratified timesteps, on the CPU.

    Column k has its timesteps in [1000 k / draws, 1000 (k + 1) / draws). Noise and timesteps depend only on a
    picture's index, so two models can be compared picture by picture. Raises ValueError for an empty cache.
    """
    count = len(cache)
    if count == 0:
        raise ValueError("no picture was held out (the recipe's holdout is 0), so there is no hold-out loss to measure")
    generators = [torch.Generator().manual_seed(place) for place in range(count)]
    noise = [torch.randn(draws, *s, generator=g) for s, g in zip(cache.shapes, generators, strict=True)]
    offset = torch.cat([torch.rand(1, generator=g) for g in generators])
    losses = torch.empty(count, draws)
    for k in range(draws):
        timesteps = ((k + offset) / draws * 1000).long().clamp(max=999)
        for places in step.group_by_shape(cache.shapes, batch):
            drawn = torch.stack([noise[place][k] for place in places])
            no = torch.zeros(len(places), dtype=torch.bool)
            inputs = cache.batch(places, torch.zeros_like(drawn), dropped=no, flipped=no, device=device)
            losses[places, k] = step.diffusion_loss(
                unet, **inputs, timesteps=timesteps[places].to(device), noise=drawn.to(device),
                alphas_cumprod=alphas_cumprod,
            ).cpu()
        if show:
            show("hold-out", k + 1, draws)
    return losses


@torch.no_grad()
def draw_previews(unet, recipe, prompts: dict[str, torch.Tensor], steps: int = 20, guidance_scale: float = 4.0) -> list:
    """PIL pictures of encoded prompts (prompt_embeds (B, L, D), pooled (B, P)) by a U-Net in training.

    The VAE is loaded for this and freed afterwards. Picture k has seed k, so previews differ only by the training.
    """
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    vae = models.load_vae(recipe.base, recipe.vae, models.DTYPES[recipe.precision], unet.device)
    scheduler = EulerDiscreteScheduler.from_pretrained(recipe.base, subfolder="scheduler")
    pipe = StableDiffusionXLPipeline(
        vae=vae, unet=unet, scheduler=scheduler, text_encoder=None, text_encoder_2=None, tokenizer=None,
        tokenizer_2=None, add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    embeds, pooled = prompts["prompt_embeds"].to(unet.dtype), prompts["pooled"].to(unet.dtype)
    pictures = []
    for k in range(len(embeds)):
        latents = pipe(
            prompt_embeds=embeds[k : k + 1],
            pooled_prompt_embeds=pooled[k : k + 1],
            negative_prompt_embeds=torch.zeros_like(embeds[:1]),
            negative_pooled_prompt_embeds=torch.zeros_like(pooled[:1]),
            generator=torch.Generator().manual_seed(k),
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            height=recipe.resolution,
            width=recipe.resolution,
            output_type="latent",
        ).images
        with torch.autocast(unet.device.type, enabled=False):  # a VAE that overflows in fp16 stays in fp32
            pictures += pipeline.to_pictures(vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample)
    return pictures
