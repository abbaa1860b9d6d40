"""Pictures from the base with or without a LoRA: one pipeline stays loaded, and only its adapters are switched."""

from __future__ import annotations

from pathlib import Path

import torch

from . import data, models
from .adapters import active, reading
from .adapters.active import BASE, add_adapter, use_adapter
from .memory import gpu
from .progress import note
from .reading.prompts import read_prompts as read_prompts

LCM = "lcm"  # the adapter, and the scheduler that needs it
SCHEDULERS = {
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "dpm++_2m": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
WITH_LCM = SCHEDULERS | {LCM: ("LCMScheduler", {})}
PROMPT_CACHE_SIZE = 256  # encoded prompts that a pipeline keeps: 80 MB for SDXL in fp16
# Peak count of values in memory for each pixel of a picture: a U-Net step with guidance, the VAE's decoder
UNET_VALUES, VAE_VALUES = 512, 1280


class Stopped(Exception):
    """Drawing was stopped by the caller; `pictures` are the finished ones."""

    def __init__(self, pictures: list):
        super().__init__("drawing was stopped")
        self.pictures = pictures


def load(base: str, vae: str = "", adapters: dict[str, str | Path] | None = None, precision: str | None = None):
    """SDXL's pipeline with all `adapters` ({name: LoRA folder or file}) loaded.

    fp16 on a GPU and fp32 on the CPU unless `precision` says otherwise. Raises FileNotFoundError for a missing
    adapter, ValueError for a base that is not SDXL.
    """
    models.check_base(base, vae)
    adapter_files = {name: reading.locate(path) for name, path in (adapters or {}).items()}
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    precision = precision or ("fp16" if torch.cuda.is_available() else "fp32")
    device, dtype = models.device_for(precision), models.DTYPES[precision]
    autoencoder = models.load_vae(base, vae, dtype, device)
    if autoencoder.config.force_upcast:
        autoencoder.enable_tiling()  # the pipeline keeps such a VAE in its own dtype, and decodes in fp32
    (tokenizer, encoder), (tokenizer_2, encoder_2) = models.load_text_encoders(base, dtype, device)
    pipe = StableDiffusionXLPipeline(
        vae=autoencoder.to(dtype),
        text_encoder=encoder,
        text_encoder_2=encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=models.load_unet(base, dtype, device),
        scheduler=EulerDiscreteScheduler.from_pretrained(base, subfolder="scheduler"),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.sources = {"base": models.identity(base), "vae": models.identity(vae or base)}
    for name, file in adapter_files.items():
        add_adapter(pipe, name, file)
    return pipe


def set_scheduler(pipe, name: str) -> None:
    """Sets the scheduler called `name`, with the base's own noise schedule.

    'lcm' (arXiv 2311.05556) draws in 4 to 8 steps, at a guidance_scale of 1 to 2. Raises ValueError for an
    unknown name, or for 'lcm' while no adapter 'lcm' is loaded.
    """
    import diffusers

    if name not in WITH_LCM:
        raise ValueError(f"no scheduler is called '{name}'; choose one of {', '.join(WITH_LCM)}")
    if name == LCM and LCM not in active.loaded(pipe):
        raise ValueError(f"the scheduler '{LCM}' needs its LoRA: pipeline.add_adapter(pipe, '{LCM}', <an LCM LoRA>)")
    if not hasattr(pipe, "base_scheduler_config"):
        pipe.base_scheduler_config = pipe.scheduler.config  # else options of one scheduler would reach the next one
    class_name, options = WITH_LCM[name]
    pipe.scheduler = getattr(diffusers, class_name).from_config(pipe.base_scheduler_config, **options)


def holdout_prompts(dataset: str | Path, holdout: float) -> list[str]:
    """The captions of the hold-out pictures, or all captions if there is no hold-out.

    Raises what `data.load` and `data.split` raise.
    """
    train, held = data.split(data.load(dataset), holdout)
    return [example.caption for example in held or train]


def cross(prompts: list[str], seeds: list[int]) -> tuple[list[str], list[int]]:
    """Each prompt with each seed, as arguments of `draw`: the first prompt with all seeds, then the second ..."""
    return [prompt for prompt in prompts for _ in seeds], [seed for _ in prompts for seed in seeds]


def seeds_for(prompts: list[str], seeds: list[int] | int) -> list[int]:
    """One seed for each prompt; an int is used for all. Raises ValueError for another number of seeds."""
    seeds = [seeds] * len(prompts) if isinstance(seeds, int) else list(seeds)
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts need as many seeds, or one for all, not {len(seeds)}")
    return seeds


def settings_of(
    pipe,
    prompts: list[str],
    seeds: list[int],
    adapter: str | dict[str, float] = BASE,
    scale: float = 1.0,
    scheduler: str = "euler",
    steps: int = 30,
    guidance_scale: float = 5.0,
    resolution: int = 1024,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
) -> list[dict]:
    """All settings of each picture, for JSON: adapters, base and VAE by their content, not their path; sets up `pipe`.

    Raises ValueError for arguments that make no sense.
    """
    if resolution % 8:
        raise ValueError(f"resolution {resolution} is not divisible by 8; use {resolution // 8 * 8}")
    weights = use_adapter(pipe, adapter, scale)
    if scheduler == LCM and LCM not in weights:
        raise ValueError(f"the scheduler '{LCM}' needs adapter '{LCM}' in use: adapter={{'{LCM}': 1, ...}}")
    set_scheduler(pipe, scheduler)
    identities, precision = pipe.__dict__.get("adapter_identities", {}), str(pipe.unet.dtype).removeprefix("torch.")
    common = {
        "adapters": {name: {"weight": weight, "identity": identities.get(name)} for name, weight in weights.items()},
        "scheduler": scheduler, "steps": steps, "guidance_scale": float(guidance_scale), "resolution": resolution,
        "guidance_interval": [*map(float, guidance_interval)], "precision": precision, **getattr(pipe, "sources", {}),
    }  # fmt: skip
    return [{"prompt": prompt, "seed": seed} | common for prompt, seed in zip(prompts, seeds, strict=True)]


@torch.no_grad()
def draw(
    pipe,
    prompts: list[str],
    seeds: list[int] | int = 0,
    adapter: str | dict[str, float] = BASE,
    scale: float = 1.0,
    scheduler: str = "euler",
    steps: int = 30,
    guidance_scale: float = 5.0,
    resolution: int = 1024,
    batch: int | None = None,
    show=None,
    stop=None,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
):
    """One PIL picture for each prompt, `resolution` px wide and high; `seeds` is one for all, or one a prompt.

    The noise comes from a CPU generator, so a seed gives the same noise on every machine and for every adapter. The
    same call gives the same bits on a CPU; another `batch` can change a pixel by one level (rounding). By default
    `batch` is what fits in memory; if memory runs out, it is halved. `guidance_interval` is the part of the steps
    with guidance (arXiv 2404.07724); the others cost half. Each picture has its settings in `info["settings"]`.
    `show(phase, done, total)` counts the steps of all pictures. `stop()` is called after each step: if it returns
    true, Stopped is raised. Raises ValueError for arguments that make no sense.
    """
    seeds = seeds_for(prompts, seeds)
    settings = settings_of(pipe, prompts, seeds, adapter, scale, scheduler, steps, guidance_scale, resolution,
                           guidance_interval)
    pipe.vae.to(pipe.unet.dtype)  # an interrupt during decoding may have left it in fp32
    pictures, phase = list[object](), f"drawing {' + '.join(settings[0]['adapters']) or BASE}" if settings else ""

    def step_done(step: int, size: int) -> None:
        if show:
            show(phase, len(pictures) * steps + step * size, len(prompts) * steps)
        if stop and stop():
            raise Stopped(pictures)

    batches = even_batches(len(prompts), batch_size(pipe, resolution, batch))
    while batches:
        drawn = _draw_if_it_fits(pipe, settings[batches[0]], step_done)
        if drawn is None:
            batches = _smaller_batches(pipe, resolution, batches, show)
            continue
        for place, (picture, own) in enumerate(zip(drawn, settings[batches[0]], strict=True)):
            picture.info["settings"] = own | {"batch": [len(drawn), place]}
        pictures += drawn
        batches = batches[1:]
    return pictures


def even_batches(count: int, largest: int) -> list[slice]:
    """`count` pictures in slices of at most `largest`, whose sizes differ by at most one."""
    number = -(-count // largest)
    ends = [count * k // max(1, number) for k in range(number + 1)]
    return [slice(start, stop) for start, stop in zip(ends, ends[1:], strict=False)]


def batch_size(pipe, resolution: int, requested: int | None = None) -> int:
    """How many pictures to draw at once: `requested`, or what is fast and fits; never a size that ran out of memory."""
    limit = pipe.__dict__.get("batch_limits", {}).get(resolution, requested or 16)
    if requested:
        return min(requested, limit)
    if pipe.unet.device.type == "cpu":
        return max(1, min(limit, 16 * 64**2 // resolution**2))
    value = pipe.unet.dtype.itemsize * resolution**2  # bytes of one value for each pixel
    free = gpu.available(pipe.unet.device) - VAE_VALUES * value
    return max(1, min(limit, 8 * 1024**2 // resolution**2, free // (UNET_VALUES * value)))


def _draw_if_it_fits(pipe, settings: list[dict], step_done) -> list | None:
    """One batch of pictures; None if memory ran out."""
    try:
        return _draw_batch(pipe, settings, step_done)
    except torch.OutOfMemoryError:
        return None


def _smaller_batches(pipe, resolution: int, batches: list[slice], show) -> list[slice]:
    """The remaining batches, cut to half the size of the first, which did not fit.

    If the first is a single picture, the VAE will decode in tiles. Raises RuntimeError if it already does.
    """
    gpu.free()
    pipe.vae.to(pipe.unet.dtype)
    size = batches[0].stop - batches[0].start
    if size > 1:
        half = -(-size // 2)
        pipe.batch_limits = pipe.__dict__.get("batch_limits", {}) | {resolution: half}
        note(show, f"memory ran out with a batch of {size} pictures: from now on at most {half}")
        return [slice(batch.start + part.start, batch.start + part.stop)
                for batch in batches for part in even_batches(batch.stop - batch.start, half)]
    if pipe.vae.use_tiling:
        raise RuntimeError(f"memory does not hold one picture of {resolution} px; choose a lower resolution")
    pipe.vae.enable_tiling()
    note(show, "memory ran out with one picture: the VAE now decodes in tiles")
    return batches


def _draw_batch(pipe, settings: list[dict], step_done) -> list:
    """PIL pictures; `step_done(step, pictures)` is called after each step."""
    prompts, common = [own["prompt"] for own in settings], settings[0]
    steps, scale, (first, last) = (common[key] for key in ("steps", "guidance_scale", "guidance_interval"))
    guided = [scale > 1 and first <= step / steps < last for step in range(steps)]
    embeds, pooled = _prompt_embeddings(pipe, prompts)
    negative_embeds, negative_pooled = _negative_embeddings(pipe, len(prompts))

    def switch_guidance(pipe, step: int, timestep, tensors: dict) -> dict:
        step_done(step + 1, len(prompts))
        guide_next = guided[min(step + 1, steps - 1)]
        if guide_next == pipe.do_classifier_free_guidance:
            return {}
        pipe._guidance_scale = scale if guide_next else 1.0
        return {
            "prompt_embeds": torch.cat([negative_embeds, embeds]) if guide_next else embeds,
            "add_text_embeds": torch.cat([negative_pooled, pooled]) if guide_next else pooled,
            "add_time_ids": tensors["add_time_ids"][:1].repeat(len(prompts) * (1 + guide_next), 1),  # all are the same
        }

    _slice_decoding(pipe, len(prompts), common["resolution"])
    return pipe(
        prompt_embeds=embeds,
        pooled_prompt_embeds=pooled,
        negative_prompt_embeds=negative_embeds,
        negative_pooled_prompt_embeds=negative_pooled,
        generator=[torch.Generator().manual_seed(own["seed"]) for own in settings],
        num_inference_steps=steps,
        guidance_scale=scale if guided[0] else 1.0,
        height=common["resolution"],
        width=common["resolution"],
        callback_on_step_end=switch_guidance,
        callback_on_step_end_tensor_inputs=["add_time_ids"],
    ).images


def _prompt_embeddings(pipe, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """prompt_embeds (B, L, D) and pooled (B, P). Each prompt is encoded once, in a batch of 1, and cached.

    The cache serves the base and all adapters; those that change text encoders have entries of their own.
    """
    cached, changed, rows = pipe.__dict__.setdefault("prompt_cache", {}), pipe.__dict__.get("text_adapters", ()), []
    for prompt in prompts:
        if (prompt, changed) not in cached:
            embeds, _, pooled, _ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False)
            cached[prompt, changed] = embeds, pooled
        rows.append(cached[prompt, changed])
        if len(cached) > PROMPT_CACHE_SIZE:
            del cached[next(iter(cached))]
    return torch.cat([embeds for embeds, _ in rows]), torch.cat([pooled for _, pooled in rows])


def _negative_embeddings(pipe, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The empty negative prompt, `count` times: zeros, as in SDXL's own pipeline, or the encoded empty text."""
    embeds, pooled = _prompt_embeddings(pipe, [""] * count)
    if pipe.config.force_zeros_for_empty_prompt:
        return torch.zeros_like(embeds), torch.zeros_like(pooled)
    return embeds, pooled


def _slice_decoding(pipe, count: int, resolution: int) -> None:
    """Lets the VAE decode one picture at a time if `count` at once don't fit in memory."""
    pipe.vae.use_slicing = False
    if pipe.vae.device.type != "cpu":
        need = count * VAE_VALUES * pipe.vae.dtype.itemsize * resolution**2
        pipe.vae.use_slicing = need > gpu.available(pipe.vae.device)


def to_pictures(images: torch.Tensor) -> list:
    """(B, 3, H, W) in [-1, 1], a VAE's output, as PIL pictures."""
    from PIL import Image

    pixels = ((images.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in pixels]
