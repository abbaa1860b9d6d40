"""Which model a LoRA file was made for, by its header, else by its layers' names and shapes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

SDXL = "SDXL"
HEADERS = {  # how a header's value starts, lower case
    "modelspec.architecture": {
        "stable-diffusion-xl": SDXL, "stable-diffusion-v1": "SD 1.5", "stable-diffusion-v2": "SD 2",
        "stable-diffusion-3": "SD 3", "stable-diffusion-v3": "SD 3", "flux": "Flux",
    },
    "ss_base_model_version": {
        "sdxl": SDXL, "sd_v1": "SD 1.5", "sd_1": "SD 1.5", "sd_v2": "SD 2", "sd_2": "SD 2", "sd3": "SD 3",
        "flux": "Flux",
    },
}  # fmt: skip
NAMES = {  # in a layer's name; the first that is found tells
    r"double_blocks|single_blocks|single_transformer_blocks": "Flux",
    r"joint_blocks|transformer_blocks_\d+_attn_(add_|to_)": "SD 3",
    r"^(lora_)?transformer_|^(diffusion_model|lora_unet)_(blocks|layers)_\d": "a model with a transformer, not a U-Net",
}
CONTEXT = {768: "SD 1.5", 1024: "SD 2", 1280: "SDXL's refiner", 2048: SDXL}  # the width of its prompt embeddings
FIRST_BLOCK = r"(down_blocks_0_attentions|input_blocks_1_1)_"  # SDXL has no attention there


def model(shapes: Mapping[str, Iterable[int]], header: Mapping[str, str]) -> str | None:
    """The model in a few words, such as 'SD 1.5'; None if nothing tells.

    `shapes` are {module: the shape of what multiplies its input}. The names count first: a header can be copied.
    """
    plain = {name.replace(".", "_"): tuple(shape) for name, shape in shapes.items()}
    unet = {name for name in plain if "encoder_layers" not in name and "resblocks" not in name}
    for pattern, found in NAMES.items():
        if any(re.search(pattern, name) for name in unet):
            return found
    widths = {shape[1] for name, shape in plain.items() if name.endswith(("attn2_to_k", "attn2_to_v")) and shape[1:]}
    if widths and min(widths) in CONTEXT:
        return CONTEXT[min(widths)]
    for field, starts in HEADERS.items():
        value = str(header.get(field, "")).lower()
        if named := [name for start, name in starts.items() if value.startswith(start)]:
            return named[0]
    if any(re.search(FIRST_BLOCK, name) for name in unet):
        return "SD 1.5 or SD 2"
    return None
