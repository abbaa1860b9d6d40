"""LoRA on the U-Net's attention (arXiv 2106.09685) by peft: inject, save and load in diffusers' format.

`adapters/` has the other formats.
"""

from __future__ import annotations

from pathlib import Path

import torch

from .adapters import header
from .adapters.writing import file_name as file_name
from .adapters.writing import save_kohya as save_kohya
from .hub import LORA

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
FILE = LORA


def inject(unet, rank: int, alpha: float, seed: int = 0) -> list[torch.nn.Parameter]:
    """Adds LoRA to every attention projection of `unet`; returns the trainable parameters, always in fp32.

    On SDXL Base these are 1,451,520 * rank numbers in 560 layers. A starts Gaussian (from `seed`, the same on every
    device), B at zero, so the model starts as the base. Raises RuntimeError for a torchao that peft refuses.
    """
    from peft import LoraConfig

    config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=list(TARGETS))
    try:
        unet.add_adapter(config)
    except ImportError as error:
        if "torchao" not in str(error):
            raise
        raise RuntimeError(
            "peft refuses the old torchao installed here: run 'pip uninstall -y torchao' and restart the kernel"
        ) from None
    named = [(name, p) for name, p in unet.named_parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in named:
        parameter.data = parameter.data.float()
        if "lora_A" in name and parameter.device.type != "meta":
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / rank)
    return [parameter for _, parameter in named]


def save(unet, folder: str | Path) -> Path:
    """Writes `folder`/pytorch_lora_weights.safetensors, with alpha in its metadata; returns the file.

    The same weights give the same bytes.
    """
    from diffusers import StableDiffusionXLPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    config = unet.peft_config["default"].to_dict()
    StableDiffusionXLPipeline.save_lora_weights(
        folder,
        unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(unet)),
        unet_lora_adapter_metadata=config | {"target_modules": sorted(config["target_modules"])},
    )
    header.sort(Path(folder) / FILE)
    return Path(folder) / FILE


def restore(unet, folder: str | Path) -> None:
    """Loads a saved adapter's weights, bit for bit, into the LoRA that `inject` added to `unet`.

    Raises ValueError if they belong to another U-Net or have another rank.
    """
    from diffusers.utils import convert_unet_state_dict_to_peft
    from peft.utils import set_peft_model_state_dict
    from safetensors.torch import load_file

    weights = {name.removeprefix("unet."): value for name, value in load_file(Path(folder) / FILE).items()}
    try:
        result = set_peft_model_state_dict(unet, convert_unet_state_dict_to_peft(weights), "default")
        fits = not result.unexpected_keys and not any("lora_" in name for name in result.missing_keys)
    except RuntimeError:  # other shapes
        fits = False
    if not fits:
        raise ValueError(f"the adapter in '{folder}' does not fit this U-Net; was it trained on another base or rank?")
