"""Names of layers: what each program calls a module of the U-Net or of a text encoder, found in the loaded base.

In a name dots and underscores count alike: `down_blocks.1.attentions.0` is `down_blocks_1_attentions_0`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

PARTS = ("unet", "text_encoder", "text_encoder_2")  # of the pipeline, as diffusers names them
PREFIXES = {  # what stands before a module's name: its part; a longer one is tried first
    "lora_unet": "unet", "unet": "unet", "diffusion_model": "unet", "model_diffusion_model": "unet", "lycoris": "unet",
    "lora_te1": "text_encoder", "lora_te2": "text_encoder_2", "lora_te": "text_encoder",
    "text_encoder": "text_encoder", "text_encoder_2": "text_encoder_2",
    "clip_l": "text_encoder", "clip_g": "text_encoder_2",
    "clip_l_transformer": "text_encoder", "clip_g_transformer": "text_encoder_2",
    "text_encoders_clip_l_transformer": "text_encoder", "text_encoders_clip_g_transformer": "text_encoder_2",
    "conditioner_embedders_0_transformer": "text_encoder", "conditioner_embedders_1_model": "text_encoder_2",
}  # fmt: skip
LONGEST_FIRST = sorted(PREFIXES, key=len, reverse=True)
RESNET = {  # a residual block's modules: diffusers' name, LDM's
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
OUTSIDE = {  # of the blocks
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
OPEN_CLIP = {  # of a text encoder's layer: transformers' name, OpenCLIP's
    "self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
}  # fmt: skip
LOW_RANK = re.compile(r"(.+?)(?:\.lora(?:_linear_layer)?\.|_lora\.|\.lora_)(down|up|mid|A|B)(?:\.\w+)?\.weight")
OTHER = re.compile(
    r"(.+?)\.(alpha|dora_scale|lora_magnitude_vector|scalar|hada_[wt][12](?:_[ab])?|lokr_[wt][12](?:_[ab])?|diff|diff_b"
    r"|w_norm|b_norm|on_input|set_weight|oft_\w+|boft_\w+|[ab][12]|lora_\w+(?=(?:\.\w+)?\.bias$))"
    r"(?:\.\w+)?(?:\.weight|\.bias)?"
)
SAME = {"A": "down", "B": "up", "lora_magnitude_vector": "dora_scale"}  # peft's word: ours


def split(key: str) -> tuple[str, str] | None:
    """(module, what it is of the module's layer) of a tensor's name, such as ('lora_unet_…_to_q', 'down').

    None for a tensor that is no adapter's.
    """
    found = LOW_RANK.fullmatch(key) or OTHER.fullmatch(key)
    if not found:
        return None
    return found[1], "bias" if key.endswith(".bias") else SAME.get(found[2], found[2])


def ldm_names(modules: Iterable[str]) -> dict[str, str]:
    """{diffusers' name: LDM's, the original code's} of a U-Net's modules; kohya-ss and ComfyUI use LDM's.

    `modules` are all names in the U-Net: its blocks are numbered through (input_blocks.4.1 is down_blocks.1's first
    attention), so each must be counted.
    """
    modules = list(modules)
    resnets = {side: _resnets(modules, side) for side in ("down_blocks", "up_blocks")}
    attentive = {tuple(name.split(".")[:2]) for name in modules if ".attentions." in name}
    found = {name: OUTSIDE.get(name) or _in_block(name.split("."), resnets, attentive) for name in modules}
    return {name: ldm for name, ldm in found.items() if ldm}


def _resnets(modules: list[str], side: str) -> list[int]:
    """How many residual blocks each block of a side has."""
    places = {tuple(name.split(".")[1:4:2]) for name in modules if name.startswith(side) and ".resnets." in name}
    return [sum(block == str(k) for block, _ in places) for k in range(len({block for block, _ in places}))]


def _in_block(parts: list[str], resnets: dict[str, list[int]], attentive: set) -> str | None:
    """LDM's name of a module in a down, middle or up block; None for one that LDM doesn't have."""
    if parts[0] == "mid_block" and len(parts) > 3:
        kind, place, rest = parts[1], int(parts[2]), ".".join(parts[3:])
        inside = RESNET.get(rest) if kind == "resnets" else rest
        return inside and f"middle_block.{2 * place + (kind == 'attentions')}.{inside}"
    if parts[0] not in resnets or len(parts) < 5:
        return None
    down, block, kind, place = parts[0] == "down_blocks", int(parts[1]), parts[2], int(parts[3])
    counts, side = resnets[parts[0]], "input_blocks" if down else "output_blocks"
    first = sum(counts[:block]) + (1 + block if down else 0)  # after conv_in and each block's downsampler
    if kind == "downsamplers":
        return f"{side}.{first + counts[block]}.0.op"
    if kind == "upsamplers":
        return f"{side}.{first + counts[block] - 1}.{2 if tuple(parts[:2]) in attentive else 1}.conv"
    rest = ".".join(parts[4:])
    inside = RESNET.get(rest) if kind == "resnets" else rest
    return inside and f"{side}.{first + place}.{int(kind == 'attentions')}.{inside}"


class Names:
    """Finds the module that a name in a file means; `modules` are {part: names of its modules that can have a LoRA}."""

    def __init__(self, modules: Mapping[str, Iterable[str]], all_of_unet: Iterable[str] = ()):
        self.tables = {part: {_plain(name): name for name in names} for part, names in modules.items()}
        unet = self.tables.setdefault("unet", {})
        ldm = ldm_names(all_of_unet or modules.get("unet", ()))
        unet |= {_plain(ldm[name]): name for name in list(unet.values()) if name in ldm}
        for part in PARTS[1:]:
            table = self.tables.setdefault(part, {})
            table |= {plain.removeprefix("text_model_"): name for plain, name in list(table.items())}
            table |= {_plain(open_clip): name for name in list(table.values()) for open_clip in _open_clip(name)}

    def find(self, module: str) -> tuple[str, str | None]:
        """(part, the module's name in the loaded base); the name is None if the base has no such module."""
        plain = _plain(module).removeprefix("base_model_model_").replace("_processor_", "_")
        for prefix in LONGEST_FIRST:
            if plain.startswith(f"{prefix}_"):
                part, rest = PREFIXES[prefix], plain[len(prefix) + 1 :]
                return part, self._within(part, rest)
        return "unet", self._within("unet", plain)

    def _within(self, part: str, plain: str) -> str | None:
        table = self.tables[part]
        if part == "unet":  # diffusers' older names lack the index
            return table.get(plain) or table.get(f"{plain}_0")
        plain = re.sub(r"_to_(q|k|v|out)$", r"_\1_proj", plain.removeprefix("text_model_"))
        return table.get(plain)


def _plain(name: str) -> str:
    return name.replace(".", "_")


def _open_clip(name: str) -> list[str]:
    found = re.fullmatch(r"(?:text_model\.)?encoder\.layers\.(\d+)\.(.+)", name)
    return [f"transformer.resblocks.{found[1]}.{OPEN_CLIP[found[2]]}"] if found and found[2] in OPEN_CLIP else []
