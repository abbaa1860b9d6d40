"""Pretraining, the end: the diffusers folder, and figures of what a plain pipeline draws with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from naruto_lora.tiny import judge as judging
from naruto_lora.tiny import world
from naruto_lora.tiny.pretrain_engine import Record
from naruto_lora.tiny.pretrain_pictures import captioned_sheet
from naruto_lora.tiny.pretrain_unet import BETAS, Parts

LARGEST = 16 * 2**20  # bytes a file
MODULES = {
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "image_encoder": [None, None],
    "feature_extractor": [None, None],
}


def half_precision(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state of a model in fp16, on the CPU; counters keep their kind."""
    return {
        k: (v.half() if v.is_floating_point() else v).contiguous().cpu()
        for k, v in model.state_dict().items()
    }


def _save_text_encoder(encoder, folder: Path) -> None:
    """As SDXL's files are, whatever transformers is here: names under `text_model.`, bar the projection's."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v for k, v in half_precision(encoder).items() if not k.endswith("position_ids")}
    named = {k if k.startswith("text_") else f"text_model.{k}": v for k, v in state.items()}
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    config = encoder.config.to_dict() | {"architectures": [type(encoder).__name__], "dtype": "float16"}
    config["torch_dtype"] = "float16"  # the name that transformers 4 knows
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True, default=str) + "\n")


def save_base(parts: Parts, vae, scale: float, work: Path, out: Path) -> dict[str, float]:
    """Write the diffusers folder, weights in fp16. Returns MiB by file; ValueError above 16 MiB a file."""
    import diffusers
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(work / name, out / name, dirs_exist_ok=True)
    vae.register_to_config(scaling_factor=scale)
    for name, model in (("unet", parts.unet), ("vae", vae)):
        model.save_config(out / name)
        file = out / name / "diffusion_pytorch_model.safetensors"
        save_file(half_precision(model), file, metadata={"format": "pt"})
    _save_text_encoder(parts.text_encoder, out / "text_encoder")
    _save_text_encoder(parts.text_encoder_2, out / "text_encoder_2")
    scheduler = diffusers.EulerDiscreteScheduler(
        **BETAS,
        timestep_spacing="leading",
        steps_offset=1,
        use_karras_sigmas=False,
        prediction_type="epsilon",
    )
    scheduler.save_pretrained(out / "scheduler")
    index = {"_class_name": "StableDiffusionXLPipeline", "_diffusers_version": diffusers.__version__}
    index |= {"force_zeros_for_empty_prompt": True} | MODULES
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    sizes = {str(f.relative_to(out)): f.stat().st_size for f in sorted(out.rglob("*.safetensors"))}
    if max(sizes.values()) > LARGEST:
        raise ValueError(f"a file of the base is larger than {LARGEST} bytes: {sizes}")
    return {name: round(size / 2**20, 2) for name, size in sizes.items()}


def draw_base(base: Path, judge, reports: Path, record: Record, settings, device: torch.device) -> None:
    """Draw the prompts with a plain pipeline, read the pictures, keep figures and a sheet by guidance."""
    from diffusers import StableDiffusionXLPipeline

    dtype = torch.float16 if device.type == "cuda" else torch.float32
    pipeline = StableDiffusionXLPipeline.from_pretrained(base, torch_dtype=dtype, add_watermarker=False).to(
        device
    )
    pipeline.set_progress_bar_config(disable=True)
    prompts = world.prompts(settings.prompts, seed=settings.seed + 777)
    texts = [prompt["text"] for prompt in prompts]
    for guidance in settings.guidances:
        pictures = []
        for start in range(0, len(texts), 100):
            part = texts[start : start + 100]
            noise = [torch.Generator("cpu").manual_seed(start + n) for n in range(len(part))]
            drawn = pipeline(
                part, num_inference_steps=settings.euler_steps, guidance_scale=guidance, generator=noise
            )
            pictures += drawn.images
        result = judging.score(pictures, prompts, judge)
        figures = {
            "attributes": round(100 * float(result["attributes"].mean()), 2),
            "style": round(100 * float(result["style"].mean()), 2),
            "by_attribute": {name: round(100 * share, 2) for name, share in result["by_attribute"].items()},
            "n": len(pictures),
        }
        record.note("figures", **{f"guidance_{guidance:g}": figures})
        record.say(f"base at guidance {guidance:g}: {figures}")
        captioned_sheet(pictures[:40], texts[:40], reports / f"base_guidance_{guidance:g}.png")
