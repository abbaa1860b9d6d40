"""The LoRA file for every program: kohya-ss's own layout, `lora_unet_input_blocks_4_1_…`, in fp16."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from ..hub import LORA
from . import header
from .names import ldm_names

KINDS = {"lora_A": "lora_down", "lora_B": "lora_up"}  # peft's word: kohya-ss's


def file_name(folder: str | Path, recipe: str) -> str:
    """The file's name in the run's `folder`: the run's, which is its folder's; `recipe` if that can't name a file.

    So ComfyUI's and A1111's lists tell two runs of the same recipe apart.
    """
    name = Path(os.path.abspath(folder)).name
    usable = re.fullmatch(r"\w[\w .+-]*", name) and f"{name}.safetensors" != LORA
    return f"{name if usable else recipe}.safetensors"


def save_kohya(unet, file: str | Path, alpha: float, run: dict | None = None) -> Path:
    """Writes the LoRA of `unet` with kohya-ss's names, alpha per layer and a header; returns the file.

    ComfyUI, A1111, Forge, InvokeAI, SwarmUI, SD.Next, OneTrainer, diffusers and sd-scripts read it whole, also to train
    on or to merge. `run` is the run's record, for the header. The same LoRA of the same run gives the same bytes.
    """
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save

    file, layers, rank = Path(file), {}, 0
    ldm = ldm_names(name for name, _ in unet.named_modules())
    for name, weight in get_peft_model_state_dict(unet).items():
        module, kind, _ = name.rsplit(".", 2)
        prefix = f"lora_unet_{ldm[module].replace('.', '_')}"
        layers[f"{prefix}.{KINDS[kind]}.weight"] = weight.detach().half().cpu().contiguous()
        layers[f"{prefix}.alpha"] = torch.tensor(float(alpha))
        rank = len(weight) if kind == "lora_A" else rank
    file.write_bytes(header.with_header(save(layers), header.of_run(file.stem, rank, alpha, run)))
    return file
