"""The header of a LoRA file: what A1111, Forge, SwarmUI, SD.Next, ComfyUI's managers and model sites read of it.

`ss_*` are kohya-ss's fields, `modelspec.*` those of github.com/Stability-AI/ModelSpec (1.0.1). Without
`ss_base_model_version` A1111 takes a file with a header for SD 1 and hides it beside SDXL. `lora_adapter_metadata`
(diffusers') must not stand beside alphas: diffusers refuses both together. There is no date, no path and nothing of
the machine, so that the same run gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from .. import hub

LICENSED = "stabilityai/stable-diffusion-xl"  # SDXL's own repositories, under OpenRAIL++-M


def of_run(name: str, rank: int, alpha: float, run: dict | None = None) -> dict[str, str]:
    """The header of the LoRA `name`; `run` is the run's record, as in run.json: recipe, step, pictures."""
    fields = {
        "format": "pt",
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_v2": "False",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(float(alpha)),
        "ss_output_name": name,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.prediction_type": "epsilon",
        "modelspec.title": name,
    }
    return fields | (_trained(run, rank) if run else {})


def _trained(run: dict, rank: int) -> dict[str, str]:
    """What the run's record says of the training. Batch and accumulation only as their product: a run may change them
    on another machine."""
    recipe, steps, side = run["recipe"], run["step"], run["recipe"]["resolution"]
    seen, pictures = recipe["batch"] * recipe["accumulation"], run["pictures"]["training"]
    fields = {
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.description": f"A style LoRA of rank {rank} for Stable Diffusion XL: {steps:,} steps of {seen} at "
                                 f"{side} px, on {pictures:,} captioned pictures",
        "ss_resolution": f"({side}, {side})",
        "ss_steps": str(steps),
        "ss_max_train_steps": str(recipe["legs"][-1]["until"]),
        "ss_num_train_images": str(pictures),
        "ss_total_batch_size": str(seen),
        "ss_learning_rate": str(recipe["legs"][0]["lr"]),
        "ss_unet_lr": str(recipe["legs"][0]["lr"]),
        "ss_caption_dropout_rate": str(recipe["caption_dropout"]),
        "ss_enable_bucket": str(recipe["buckets"]),
        "ss_seed": str(recipe["seed"]),
        "ss_mixed_precision": "fp16" if recipe["precision"] == "fp16" else "no",
    }  # fmt: skip
    if recipe["base"].startswith(LICENSED):
        fields["modelspec.license"] = "CreativeML Open RAIL++-M"
    if hub.is_repository(recipe["base"]):  # a folder's name is nobody else's business
        fields["ss_sd_model_name"] = recipe["base"]
    return fields


def with_header(data: bytes, fields: dict[str, str]) -> bytes:
    """A safetensors file's bytes with `fields` as its only metadata, and the hash of its tensors; all sorted.

    The format is 8 bytes of length, JSON, then the tensors (huggingface.co/docs/safetensors).
    """
    length = int.from_bytes(data[:8], "little")
    tensors, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    tensors.pop("__metadata__", None)
    fields = fields | {"sshs_model_hash": hashlib.sha256(body).hexdigest()}
    header = {"__metadata__": dict(sorted(fields.items()))} | dict(sorted(tensors.items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)  # the tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text + body


def sort(file: Path) -> None:
    """Sorts a safetensors file's metadata in place; safetensors writes it in random order. The length stays."""
    with open(file, "rb+") as handle:
        length = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        if len(text) == length:
            handle.seek(8)
            handle.write(text)
