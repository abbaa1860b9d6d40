"""Pictures from the base with or without LoRA: one resident pipeline, adapters switched, never reloaded."""

from __future__ import annotations

from pathlib import Path

import torch

from . import models

BASE = "base"  # the name that stands for 'no adapter'
SCHEDULERS = {
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "dpm++_2m": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
}


def load(base: str, vae: str = "", adapters: dict[str, str | Path] | None = None, precision: str | None = None):
    """SDXL's pipeline with `adapters` ({name: LoRA folder or file}) loaded beside each other.

    fp16 on a GPU and fp32 on the CPU unless `precision` says otherwise. Raises FileNotFoundError for a missing
    adapter, ValueError for a base that is no SDXL.
    """
    models.check_base(base, vae)
    files = {name: _adapter_file(path) for name, path in (adapters or {}).items()}
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    precision = precision or ("fp16" if torch.cuda.is_available() else "fp32")
    device, dtype = models.device_for(precision), models.DTYPES[precision]
    coder = models.load_vae(base, vae, dtype, device)
    if coder.config.force_upcast:
        coder.enable_tiling()  # the pipeline takes such a VAE in its own dtype, and decodes in fp32
    (tokenizer, encoder), (tokenizer_2, encoder_2) = models.load_text_encoders(base, dtype, device)
    pipe = StableDiffusionXLPipeline(
        vae=coder.to(dtype),
        text_encoder=encoder,
        text_encoder_2=encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=models.load_unet(base, dtype, device),
        scheduler=EulerDiscreteScheduler.from_pretrained(base, subfolder="scheduler"),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    for name, file in files.items():
        add_adapter(pipe, name, file)
    return pipe


def _adapter_file(path: str | Path) -> Path:
    from .lora import FILE

    file = Path(path) / FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no LoRA at '{file}'; train one with the notebooks 02 and 03, or give another path")
    return file


def add_adapter(pipe, name: str, path: str | Path) -> None:
    """Loads a LoRA (its folder or .safetensors file) under `name`. Raises FileNotFoundError, ValueError."""
    file = _adapter_file(path)
    if name == BASE or not name.isidentifier():
        raise ValueError(f"'{name}' can't name an adapter; take a word of letters, digits and _, other than '{BASE}'")
    try:
        pipe.load_lora_weights(file.parent, weight_name=file.name, adapter_name=name)
    except (OSError, RuntimeError, ValueError, KeyError):  # broken, or made for another U-Net: many lines of it
        if name in getattr(pipe.unet, "peft_config", {}):
            pipe.delete_adapters(name)
        raise ValueError(f"the LoRA '{file}' is broken or was made for another base; take one of this base") from None


def use_adapter(pipe, name: str, scale: float = 1.0) -> None:
    """Makes `name` the only active adapter at `scale`; 'base' or scale 0 gives the untouched base, bit for bit.

    Raises ValueError for a name that wasn't loaded.
    """
    loaded = getattr(pipe.unet, "peft_config", {})
    if name != BASE and name not in loaded:
        raise ValueError(f"no adapter is called '{name}'; loaded are {', '.join((BASE, *loaded))}")
    if name == BASE or scale == 0:
        if loaded:
            pipe.disable_lora()
        return
    pipe.enable_lora()
    pipe.set_adapters(name, scale)


def set_scheduler(pipe, name: str) -> None:
    """Puts the sampler called `name` in `pipe`, with SDXL's own noise schedule. Raises ValueError if unknown."""
    import diffusers

    if name not in SCHEDULERS:
        raise ValueError(f"no scheduler is called '{name}'; take one of {', '.join(SCHEDULERS)}")
    if not hasattr(pipe, "own_schedule"):
        pipe.own_schedule = pipe.scheduler.config  # a sampler's settings stay in its config: each starts from here
    kind, extra = SCHEDULERS[name]
    pipe.scheduler = getattr(diffusers, kind).from_config(pipe.own_schedule, **extra)


def draw(
    pipe,
    prompts: list[str],
    seeds: list[int] | int = 0,
    adapter: str = BASE,
    scale: float = 1.0,
    scheduler: str = "euler",
    steps: int = 30,
    guidance_scale: float = 5.0,
    resolution: int = 1024,
    batch: int = 1,
    show=None,
):
    """One PIL picture a prompt, of `resolution` px; `seeds` is one for all, or one a prompt.

    The noise comes from a CPU generator, so that a seed means one picture on every machine and for every adapter.
    `show(phase, done, total)` is called after each batch.
    """
    if resolution % 8:
        raise ValueError(f"resolution {resolution} is not divisible by 8; take {resolution // 8 * 8}")
    seeds = [seeds] * len(prompts) if isinstance(seeds, int) else list(seeds)
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts need as many seeds, or one for all, not {len(seeds)}")
    set_scheduler(pipe, scheduler)
    use_adapter(pipe, adapter, scale)
    pictures = []
    for start in range(0, len(prompts), batch):
        part = slice(start, start + batch)
        pictures += pipe(
            prompts[part],
            generator=[torch.Generator().manual_seed(seed) for seed in seeds[part]],
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            height=resolution,
            width=resolution,
        ).images
        if show:
            show(f"drawing {adapter}", len(pictures), len(prompts))
    return pictures


@torch.no_grad()
def preview(unet, recipe, prompts: dict[str, torch.Tensor], steps: int = 20, guidance_scale: float = 4.0) -> list:
    """PIL pictures of encoded prompts (prompt_embeds (B, L, D), pooled (B, P)) by a U-Net that is being trained.

    The VAE is loaded for it and freed again. Picture k has seed k, so that previews differ by the training alone.
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
            pictures += to_pictures(vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample)
    return pictures


def to_pictures(images: torch.Tensor) -> list:
    """(B, 3, H, W) in [-1, 1], as a VAE decodes them, to PIL pictures."""
    from PIL import Image

    pixels = ((images.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in pixels]
