"""Pictures from the base with or without LoRA: one resident pipeline, adapters switched, never reloaded."""

from __future__ import annotations

from pathlib import Path

import torch

from . import data, files, models
from .memory import gpu
from .progress import note
from .reading.prompts import read_prompts as read_prompts

BASE = "base"  # the name that stands for 'no adapter'
LCM = "lcm"  # the adapter, and the scheduler that draws with it alone
STRONGEST = 1.5  # an adapter's weight; beyond it pictures fall apart
SCHEDULERS = {
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "dpm++_2m": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
WITH_LCM = SCHEDULERS | {LCM: ("LCMScheduler", {})}
KNOWN_PROMPTS = 256  # encoded texts that a pipeline keeps: 80 MB for SDXL in fp16
# Numbers that are held at once for one pixel of a picture: the U-Net's step with guidance, the VAE's decoder
UNET_NUMBERS, VAE_NUMBERS = 512, 1280


class Stopped(Exception):
    """Drawing was asked to stop; `pictures` are those that were finished before."""

    def __init__(self, pictures: list):
        super().__init__("drawing was stopped")
        self.pictures = pictures


def load(base: str, vae: str = "", adapters: dict[str, str | Path] | None = None, precision: str | None = None):
    """SDXL's pipeline with `adapters` ({name: LoRA folder or file}) loaded beside each other.

    fp16 on a GPU and fp32 on the CPU unless `precision` says otherwise. Raises FileNotFoundError for a missing
    adapter, ValueError for a base that is no SDXL.
    """
    models.check_base(base, vae)
    found = {name: _adapter_file(path) for name, path in (adapters or {}).items()}
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
    pipe.sources = {"base": models.identity(base), "vae": models.identity(vae or base)}
    for name, file in found.items():
        add_adapter(pipe, name, file)
    return pipe


def _adapter_file(path: str | Path) -> Path:
    from .lora import FILE

    file = Path(path) / FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no LoRA at '{file}'; train one with the notebooks 02 and 03, or give another path")
    return file


def add_adapter(pipe, name: str, path: str | Path) -> None:
    """Loads a LoRA (its folder or .safetensors file) under `name`, beside those that are loaded.

    Raises FileNotFoundError, and ValueError for a name that is taken or a LoRA that doesn't fit.
    """
    file = _adapter_file(path)
    if name == BASE or not name.isidentifier():
        raise ValueError(f"'{name}' can't name an adapter; take a word of letters, digits and _, other than '{BASE}'")
    identities = pipe.__dict__.setdefault("adapter_identities", {})
    if name in getattr(pipe.unet, "peft_config", {}):
        if identities.get(name) == files.sha256(file)[:16]:
            return
        raise ValueError(f"another adapter is called '{name}' already; take another name")
    try:
        pipe.load_lora_weights(file.parent, weight_name=file.name, adapter_name=name)
    except (OSError, RuntimeError, ValueError, KeyError):  # broken, or made for another U-Net: many lines of it
        if name in getattr(pipe.unet, "peft_config", {}):
            pipe.delete_adapters(name)
        raise ValueError(f"the LoRA '{file}' is broken or was made for another base; take one of this base") from None
    identities[name] = files.sha256(file)[:16]


def use_adapter(pipe, adapter: str | dict[str, float], scale: float = 1.0) -> dict[str, float]:
    """Switches to one adapter by name, or to several with a weight each, times `scale`; returns the weights in use.

    'base' or weights of 0 give the untouched base, bit for bit. Raises ValueError for a name that wasn't loaded or
    a weight outside 0 to 1.5.
    """
    loaded = getattr(pipe.unet, "peft_config", {})
    named = {adapter: 1.0} if isinstance(adapter, str) else adapter
    weights = {name: float(weight * scale) for name, weight in named.items() if name != BASE}
    for name, weight in weights.items():
        if name not in loaded:
            raise ValueError(f"no adapter is called '{name}'; loaded are {', '.join((BASE, *loaded))}")
        if not 0 <= weight <= STRONGEST:
            raise ValueError(f"adapter '{name}' can't have weight {weight:g}; take one from 0 to {STRONGEST:g}")
    weights = {name: weight for name, weight in weights.items() if weight}
    if weights:
        pipe.enable_lora()
        pipe.set_adapters(list(weights), list(weights.values()))
    elif loaded:
        pipe.disable_lora()
    return weights


def set_scheduler(pipe, name: str) -> None:
    """Puts the sampler called `name` in `pipe`, with SDXL's own noise schedule.

    'lcm' (arXiv 2311.05556) draws in 4 to 8 steps, at a guidance_scale of 1 to 2. Raises ValueError if the name is
    unknown, or 'lcm' while no adapter 'lcm' is loaded.
    """
    import diffusers

    if name not in WITH_LCM:
        raise ValueError(f"no scheduler is called '{name}'; take one of {', '.join(WITH_LCM)}")
    if name == LCM and LCM not in getattr(pipe.unet, "peft_config", {}):
        raise ValueError(f"the scheduler '{LCM}' needs its LoRA: pipeline.add_adapter(pipe, '{LCM}', <an LCM LoRA>)")
    if not hasattr(pipe, "own_schedule"):
        pipe.own_schedule = pipe.scheduler.config  # a sampler's settings stay in its config: each starts from here
    kind, extra = WITH_LCM[name]
    pipe.scheduler = getattr(diffusers, kind).from_config(pipe.own_schedule, **extra)


def holdout_prompts(dataset: str | Path, holdout: float) -> list[str]:
    """The captions of the pictures that a run keeps out of its training, or all if it keeps none.

    Raises what `data.load` and `data.split` raise.
    """
    train, held = data.split(data.load(dataset), holdout)
    return [example.caption for example in held or train]


def cross(prompts: list[str], seeds: list[int]) -> tuple[list[str], list[int]]:
    """Each prompt with each seed, as `draw` takes them: the first prompt's pictures come first."""
    return [prompt for prompt in prompts for _ in seeds], [seed for _ in prompts for seed in seeds]


def one_each(prompts: list[str], seeds: list[int] | int) -> list[int]:
    """A seed a prompt. Raises ValueError if there are others than one for all, or one each."""
    seeds = [seeds] * len(prompts) if isinstance(seeds, int) else list(seeds)
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts need as many seeds, or one for all, not {len(seeds)}")
    return seeds


def plan(
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
    """What decides each picture, as JSON takes it, by content and not by place; makes `pipe` ready to draw them.

    Raises ValueError for arguments that make no sense.
    """
    if resolution % 8:
        raise ValueError(f"resolution {resolution} is not divisible by 8; take {resolution // 8 * 8}")
    weights = use_adapter(pipe, adapter, scale)
    if scheduler == LCM and LCM not in weights:
        raise ValueError(f"the scheduler '{LCM}' needs adapter '{LCM}' in use: adapter={{'{LCM}': 1, ...}}")
    set_scheduler(pipe, scheduler)
    identities, precision = pipe.__dict__.get("adapter_identities", {}), str(pipe.unet.dtype).removeprefix("torch.")
    look = {
        "adapters": {name: {"weight": weight, "identity": identities.get(name)} for name, weight in weights.items()},
        "scheduler": scheduler, "steps": steps, "guidance_scale": float(guidance_scale), "resolution": resolution,
        "guidance_interval": list(map(float, guidance_interval)), "precision": precision,
        **pipe.__dict__.get("sources", {}),
    }  # fmt: skip
    return [{"prompt": prompt, "seed": seed} | look for prompt, seed in zip(prompts, seeds, strict=True)]


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
    """One PIL picture a prompt, of `resolution` px; `seeds` is one for all, or one a prompt.

    The noise comes from a CPU generator, so that a seed means one picture on every machine and for every adapter;
    but for rounding: the same call gives the same bits on a CPU, another `batch` can change a pixel by one level.
    Without `batch` it is what memory holds; where memory runs out it is halved. `guidance_interval` is the part of
    the steps that are guided (arXiv 2404.07724); the others cost half. Each picture's `info["drawn"]` says what it
    was drawn from. `show(phase, done, total)` counts the steps of all pictures; `stop()` is asked at each step, and
    if it is true Stopped is raised. Raises ValueError for arguments that make no sense.
    """
    seeds = one_each(prompts, seeds)
    told = plan(
        pipe, prompts, seeds, adapter, scale, scheduler, steps, guidance_scale, resolution, guidance_interval
    )
    pipe.vae.to(pipe.unet.dtype)  # an interrupt may have caught it while it was in fp32 to decode
    pictures, phase = [], f"drawing {' + '.join(told[0]['adapters']) or BASE}" if told else ""

    def step_done(step: int, size: int) -> None:
        if show:
            show(phase, len(pictures) * steps + step * size, len(prompts) * steps)
        if stop and stop():
            raise Stopped(pictures)

    parts = even_parts(len(prompts), together(pipe, resolution, batch))
    while parts:
        made = _attempt(pipe, told[parts[0]], step_done)
        if made is None:
            parts = _smaller(pipe, resolution, parts, show)
            continue
        for place, (picture, each) in enumerate(zip(made, told[parts[0]], strict=True)):
            picture.info["drawn"] = each | {"batch": [len(made), place]}
        pictures += made
        parts = parts[1:]
    return pictures


def even_parts(count: int, most: int) -> list[slice]:
    """Slices of `count` things, none of more than `most`, of sizes that differ by one at most."""
    number = -(-count // most)
    ends = [count * k // max(1, number) for k in range(number + 1)]
    return [slice(start, stop) for start, stop in zip(ends, ends[1:], strict=False)]


def together(pipe, resolution: int, asked: int | None = None) -> int:
    """Pictures that are drawn at once: as many as asked for, or as pay and fit, but no more than were seen to fit."""
    fits = pipe.__dict__.get("fits", {}).get(resolution, asked or 16)
    if asked:
        return min(asked, fits)
    if pipe.unet.device.type == "cpu":
        return max(1, min(fits, 16 * 64**2 // resolution**2))
    number = pipe.unet.dtype.itemsize * resolution**2  # bytes, of one number a pixel
    free = gpu.available(pipe.unet.device) - VAE_NUMBERS * number
    return max(1, min(fits, 8 * 1024**2 // resolution**2, free // (UNET_NUMBERS * number)))


def _attempt(pipe, told: list[dict], step_done) -> list | None:
    """One batch of pictures; None if memory ran out, which the pictures before survive."""
    try:
        return _draw_batch(pipe, told, step_done)
    except torch.OutOfMemoryError:
        return None


def _smaller(pipe, resolution: int, left: list[slice], show) -> list[slice]:
    """What is left to draw, halved, since the first does not fit. A single picture's VAE decodes in tiles instead.

    Raises RuntimeError if that has been tried.
    """
    gpu.free()
    pipe.vae.to(pipe.unet.dtype)
    size = left[0].stop - left[0].start
    if size > 1:
        most = -(-size // 2)
        pipe.fits = pipe.__dict__.get("fits", {}) | {resolution: most}
        note(show, f"memory ran out with {size} pictures at once: from here {most}")
        return [slice(whole.start + half.start, whole.start + half.stop)
                for whole in left for half in even_parts(whole.stop - whole.start, most)]
    if pipe.vae.use_tiling:
        raise RuntimeError(f"memory does not hold one picture of {resolution} px; take a lower resolution")
    pipe.vae.enable_tiling()
    note(show, "memory ran out with one picture: from here the VAE decodes in tiles")
    return left


def _draw_batch(pipe, told: list[dict], step_done) -> list:
    """PIL pictures; `step_done(step, pictures)` is called after each step."""
    prompts, steps, scale = [each["prompt"] for each in told], told[0]["steps"], told[0]["guidance_scale"]
    side, (first, last) = told[0]["resolution"], told[0]["guidance_interval"]
    guided = [scale > 1 and first <= step / steps < last for step in range(steps)]
    (embeds, pooled), (no_embeds, no_pooled) = _encoded(pipe, prompts), _unprompted(pipe, len(prompts))

    def switch_guidance(pipe, step: int, timestep, tensors: dict) -> dict:
        step_done(step + 1, len(prompts))
        following = guided[min(step + 1, steps - 1)]
        if following == pipe.do_classifier_free_guidance:
            return {}
        pipe._guidance_scale = scale if following else 1.0
        return {
            "prompt_embeds": torch.cat([no_embeds, embeds]) if following else embeds,
            "add_text_embeds": torch.cat([no_pooled, pooled]) if following else pooled,
            "add_time_ids": tensors["add_time_ids"][:1].repeat(len(prompts) * (1 + following), 1),  # the same for all
        }

    _slice_decoding(pipe, len(prompts), side)
    return pipe(
        prompt_embeds=embeds,
        pooled_prompt_embeds=pooled,
        negative_prompt_embeds=no_embeds,
        negative_pooled_prompt_embeds=no_pooled,
        generator=[torch.Generator().manual_seed(each["seed"]) for each in told],
        num_inference_steps=steps,
        guidance_scale=scale if guided[0] else 1.0,
        height=side,
        width=side,
        callback_on_step_end=switch_guidance,
        callback_on_step_end_tensor_inputs=["add_time_ids"],
    ).images


def _encoded(pipe, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """prompt_embeds (B, L, D) and pooled (B, P): each text is encoded once, alone, and kept.

    Kept for base and adapters alike, unless an adapter has weights for the text encoders too.
    """
    changed = any(getattr(encoder, "peft_config", None) for encoder in (pipe.text_encoder, pipe.text_encoder_2))
    known = {} if changed else pipe.__dict__.setdefault("known_prompts", {})
    rows = []
    for prompt in prompts:
        if prompt not in known:
            embeds, _, pooled, _ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False)
            known[prompt] = embeds, pooled
        rows.append(known[prompt])
        if len(known) > KNOWN_PROMPTS:
            del known[next(iter(known))]
    return torch.cat([embeds for embeds, _ in rows]), torch.cat([pooled for _, pooled in rows])


def _unprompted(pipe, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What guidance leads away from: zeros, as SDXL's own pipeline has it, or the encoded empty text."""
    embeds, pooled = _encoded(pipe, [""] * count)
    if pipe.config.force_zeros_for_empty_prompt:
        return torch.zeros_like(embeds), torch.zeros_like(pooled)
    return embeds, pooled


def _slice_decoding(pipe, count: int, resolution: int) -> None:
    """Lets the VAE decode one picture after the other where memory does not hold `count` at once."""
    pipe.vae.use_slicing = False
    if pipe.vae.device.type != "cpu":
        need = count * VAE_NUMBERS * pipe.vae.dtype.itemsize * resolution**2
        pipe.vae.use_slicing = need > gpu.available(pipe.vae.device)


def to_pictures(images: torch.Tensor) -> list:
    """(B, 3, H, W) in [-1, 1], as a VAE decodes them, to PIL pictures."""
    from PIL import Image

    pixels = ((images.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in pixels]
