"""A LoRA file read: checked first, then each of its layers matched to a module of the loaded base.

Only .safetensors is opened. What is in a pickle (.pt, .ckpt, .bin) is never looked at.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..hub import LORA, PEFT
from . import names, origin
from .layers import Layer

PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl")
COMPLETE = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # dtypes that know isfinite


@dataclass(frozen=True)
class Adapter:
    """A LoRA that fits a base: `layers` {part: {module: layer}}; `left` are names of layers without a place in it."""

    file: Path
    layers: dict[str, dict[str, Layer]]
    left: tuple[str, ...] = ()
    unsupported: tuple[str, ...] = ()  # such as 'norms'
    embeddings: int = 0  # of prompts (textual inversion), which OneTrainer can put into the same file

    def sentences(self) -> list[str]:
        """What of the file is not used, and how much is; empty if all of it is used."""
        used, said = sum(map(len, self.layers.values())), []
        if self.left:
            what = f" ({', '.join(self.unsupported)})" if self.unsupported else ""
            said = [f"{used} of the {used + len(self.left)} layers of the LoRA '{self.file.name}' fit this base; the "
                    f"others{what}, such as '{self.left[0]}', are not used"]
        if self.embeddings:
            said += [f"the LoRA '{self.file.name}' has {self.embeddings} embeddings of words too, which are not used"]
        return said


def locate(path: str | Path) -> Path:
    """The LoRA's file: `path`, or in a folder diffusers' or peft's file, or its only .safetensors file.

    Raises FileNotFoundError.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        known = [path / name for name in (LORA, PEFT[0]) if (path / name).is_file()]
        found = known or sorted(path.glob("*.safetensors"))
        if len(found) > 1 and not known:
            named = ", ".join(file.name for file in found)
            raise FileNotFoundError(f"the folder '{path}' holds several LoRAs ({named}): name one of these files")
        path = found[0] if found else path / LORA
    if not path.is_file():
        raise FileNotFoundError(f"no LoRA at '{path}'; train one with notebook 02 or 03, or correct the path")
    return path


def read(file: Path, modules: dict[str, dict[str, nn.Module]], all_of_unet=()) -> Adapter:
    """The LoRA in `file` for a base whose layers are `modules`, {part: {name: Linear or Conv2d}}.

    Raises ValueError, with one sentence, for a file that is broken, not finite, a pickle, or made for another model.
    """
    tensors, header = _open(file)
    groups, rest = _grouped(tensors)
    if not groups:
        raise ValueError(f"the LoRA '{file}' holds no LoRA layer ({_such_as(rest)}): it may be a whole model or "
                         "something else; choose a LoRA")
    _check_finite(file, groups)
    finder, config = names.Names(modules, all_of_unet), _Config(file, header)
    layers, unsupported = dict[str, dict[str, Layer]](), dict[str, None]()
    left, wrong = list[str](), list[str]()
    for module, own in groups.items():
        part, name = finder.find(module)
        own = dict(own)
        layer = Layer(own, _alpha(file, module, own.pop("alpha", None)))
        if layer.alpha is None and name:
            layer = Layer(own, config.alpha(part, name, layer.rank))
        if layer.unsupported:
            unsupported[layer.unsupported] = None
            left.append(module)
        elif layer.algorithm is None:
            raise ValueError(f"the LoRA '{file}' is broken: of its layer '{module}' it holds only "
                             f"{', '.join(sorted(own)) or 'alpha'}; download it again")
        elif name is None:
            left.append(module)
        elif not layer.fits(modules[part][name]):
            wrong.append(module)
        else:
            layers.setdefault(part, {})[name] = layer
    if wrong or left or not layers:
        _refuse_others(file, groups, header, layers, wrong, unsupported)
    return Adapter(file, layers, tuple(left), tuple(unsupported), sum(key.startswith("bundle_emb") for key in rest))


def _refuse_others(file: Path, groups: dict, header: dict, layers: dict, wrong: list, unsupported: dict) -> None:
    """Raises ValueError for a file of another model, of other shapes, or of which nothing fits this base."""
    kind = origin.model({name: _input_shape(own) for name, own in groups.items()}, header)
    if kind not in (None, origin.SDXL):
        raise ValueError(f"the LoRA '{file}' is for {kind}, not for an SDXL such as this base; use one for this base")
    if layers and not wrong:
        return
    if unsupported and not wrong:
        raise ValueError(f"the LoRA '{file}' is of a kind that is not supported ({', '.join(unsupported)}); use a "
                         "LoRA, LoHa, LoKr or DoRA")
    what = f"{len(wrong)} of its {len(groups)} layers have other shapes" if wrong else "this one has none of its layers"
    raise ValueError(f"the LoRA '{file}' was made for another base; use one for this base ({what}, such as "
                     f"'{(wrong or list(groups))[0]}')")


def _open(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(tensors, the header's metadata). Raises ValueError for anything but a whole .safetensors file."""
    try:
        with safe_open(file, "pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, dict(opened.metadata() or {})
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError) as error:
        with open(file, "rb") as handle:
            start = handle.read(64)
        if start.startswith((b"PK\x03\x04", b"\x80")) or file.suffix.lower() in PICKLES:
            reason = "is a pickle, which can run any command on this machine; use it as a .safetensors file"
        elif not start:
            reason = "is empty; download it again"
        elif start.startswith(b"version https://git-lfs"):
            reason = "is only git-lfs' pointer to the LoRA; download it again, with 'git lfs pull'"
        elif start.lstrip().startswith((b"<", b"{")):
            reason = "is a web page or a message, not a LoRA; download it again, logged in"
        else:
            reason = f"is broken or no .safetensors file ({' '.join(str(error).split())[:80]}); download it again"
        raise ValueError(f"the LoRA '{file}' {reason}") from None


def _grouped(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, dict[str, torch.Tensor]], list[str]]:
    """({module: {what: tensor}}, names of tensors that are no adapter's)."""
    groups, rest = dict[str, dict[str, torch.Tensor]](), list[str]()
    for key, tensor in tensors.items():
        if found := names.split(key):
            groups.setdefault(found[0], {})[found[1]] = tensor if found[1] == "alpha" else tensor.float()
        else:
            rest.append(key)
    return groups, rest


def _check_finite(file: Path, groups: dict[str, dict[str, torch.Tensor]]) -> None:
    bad = [module for module, own in groups.items() if not all(torch.isfinite(t.float()).all() for t in own.values())]
    if bad:
        raise ValueError(f"the LoRA '{file}' holds numbers that are not finite (NaN or Inf) in {len(bad)} of its "
                         f"{len(groups)} layers, such as '{bad[0]}': its training failed; use an earlier one of it")


def _alpha(file: Path, module: str, tensor: torch.Tensor | None) -> float | None:
    if tensor is not None and tensor.numel() != 1:
        raise ValueError(f"the LoRA '{file}' is broken: alpha of '{module}' is not one number; download it again")
    return None if tensor is None else float(tensor)


def _input_shape(own: dict[str, torch.Tensor]) -> tuple[int, ...]:
    return next((tuple(own[name].shape) for name in ("down", "hada_w1_b", "diff") if name in own), ())


def _such_as(rest: list[str]) -> str:
    return f"{len(rest)} other tensors, such as '{rest[0]}'" if rest else "it has no tensors"


class _Config:
    """peft's settings of a file: in its header, as diffusers writes them, or in adapter_config.json beside it.

    Only what decides alpha is read; fields of other versions of peft don't matter. Raises ValueError for settings
    that can't be read.
    """

    def __init__(self, file: Path, header: dict[str, str]):
        self.file, beside = file, file.with_name(PEFT[1])
        text = header.get("lora_adapter_metadata")
        if text is None and file.name == PEFT[0] and beside.is_file():
            text = beside.read_text(encoding="utf-8", errors="replace")
        try:
            self.fields = json.loads(text) if text else {}
        except (ValueError, RecursionError):
            self.fields = None
        if not isinstance(self.fields, dict):
            raise ValueError(f"the LoRA '{file}' is broken: its settings (peft's) can't be read; download it again")

    def alpha(self, part: str, module: str, rank: int) -> float | None:
        """alpha of a module without an alpha of its own; None if the settings have none."""
        value = self._of(part, "lora_alpha")
        patterns = self._of(part, "alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise ValueError(f"the LoRA '{self.file}' has a wrong alpha_pattern in its settings; download it again")
        for pattern, own in patterns.items():  # the end of a name, or an expression for it
            if module.endswith(f".{pattern}") or module == pattern or _matches(pattern, module):
                value = own
                break
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"the LoRA '{self.file}' has alpha {value!r} in its settings, which is not a finite "
                             "number; use an earlier one of it")
        return value * math.sqrt(rank) if self._of(part, "use_rslora") is True else value

    def _of(self, part: str, field: str):
        return self.fields.get(f"{part}.{field}", self.fields.get(field))


def _matches(pattern: str, module: str) -> bool:
    try:
        return re.match(rf"(.*\.)?({pattern})$", module) is not None
    except re.error:
        return False
