"""Adapters in a pipeline: loaded beside each other, switched on with their strengths, switched off, removed.

Layers are added by peft, module by module, and filled here: ranks and alphas can differ between layers, text encoders
are treated as the U-Net is, and it is the same with each version of diffusers and transformers.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from .. import files, progress
from . import names, reading

BASE = "base"  # the name that means 'no adapter'
MAX_WEIGHT = 1.5  # of an adapter; above it pictures fall apart


def add_adapter(pipe, name: str, path: str | Path, show=None) -> None:
    """Loads a LoRA (its folder or .safetensors file) as `name`; other adapters stay loaded.

    Layers that this base doesn't have are counted in a note. Raises FileNotFoundError, and ValueError for a name that
    is in use or a file that can't be used; the pipeline is then as it was.
    """
    file = reading.locate(path)
    if name == BASE or not name.isidentifier():
        raise ValueError(f"'{name}' can't name an adapter; use one word of letters, digits and _, but not '{BASE}'")
    identities, identity = pipe.__dict__.setdefault("adapter_identities", {}), files.sha256(file)[:16]
    if name in loaded(pipe):
        if identities.get(name) == identity:
            return
        raise ValueError(f"another adapter is already called '{name}'; choose another name")
    adapter = reading.read(file, modules(pipe), (module for module, _ in pipe.unet.named_modules()))
    try:
        for part, layers in adapter.layers.items():
            _attach(getattr(pipe, part), name, layers)
    except BaseException:
        remove_adapter(pipe, name)
        raise
    identities[name] = identity
    use_adapter(pipe, name)
    for sentence in adapter.sentences():
        progress.note(show, sentence)


def remove_adapter(pipe, name: str) -> None:
    """Takes an adapter out of the pipeline, and frees its memory."""
    from diffusers.utils import delete_adapter_layers

    for part in _parts(pipe).values():
        if name in _configs(part):
            delete_adapter_layers(part, name)
            _configs(part).pop(name, None)
    pipe.__dict__.get("adapter_identities", {}).pop(name, None)


def loaded(pipe) -> list[str]:
    """The names of the adapters in the pipeline, also of those for the text encoders alone."""
    return list(dict.fromkeys(name for part in _parts(pipe).values() for name in _configs(part)))


def use_adapter(pipe, adapter: str | dict[str, float], scale: float = 1.0) -> dict[str, float]:
    """Activates one adapter, or several as {name: weight}, times `scale`; returns the active {name: weight}.

    'base' or weights of 0 give the unchanged base, bit for bit. Raises ValueError for a name that isn't loaded or a
    weight outside 0 to 1.5.
    """
    available = loaded(pipe)
    requested = {adapter: 1.0} if isinstance(adapter, str) else adapter
    weights = {name: float(weight * scale) for name, weight in requested.items() if name != BASE}
    for name, weight in weights.items():
        if name not in available:
            raise ValueError(f"no adapter is called '{name}'; loaded are {', '.join((BASE, *available))}")
        if not 0 <= weight <= MAX_WEIGHT:
            raise ValueError(f"adapter '{name}' can't have weight {weight:g}; choose one from 0 to {MAX_WEIGHT:g}")
    weights = {name: weight for name, weight in weights.items() if weight}
    for part in _parts(pipe).values() if available else ():
        for layer in _peft_layers(part).values():
            if weights:
                layer.set_adapter(list(weights))
            for name, weight in weights.items():
                layer.set_scale(name, weight)
            layer.enable_adapters(bool(weights))
    pipe.text_adapters = _changing_text(pipe, weights)
    return weights


def _changing_text(pipe, weights: dict[str, float]) -> tuple:
    """Which of the active adapters change prompt embeddings: ((identity, weight), ...) in order."""
    encoders = [part for name, part in _parts(pipe).items() if name != "unet"]
    changing = [name for name in weights if any(name in _configs(encoder) for encoder in encoders)]
    identities = pipe.__dict__.get("adapter_identities", {})
    return tuple((identities.get(name, name), weights[name]) for name in changing)


def modules(pipe) -> dict[str, dict[str, nn.Module]]:
    """{part: {name: module}} of all that can have a LoRA: Linear and Conv2d, as the base has them."""
    found = {}
    for part, model in _parts(pipe).items():
        wrapped = {name: layer.get_base_layer() for name, layer in _peft_layers(model).items()}
        own = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
        inside = tuple(f"{name}." for name in wrapped)
        found[part] = {name: module for name, module in own.items() if not name.startswith(inside)} | wrapped
    return found


def _parts(pipe) -> dict[str, nn.Module]:
    found = {name: getattr(pipe, name, None) for name in names.PARTS}
    return {name: part for name, part in found.items() if isinstance(part, nn.Module)}


def _configs(part: nn.Module) -> dict:
    return getattr(part, "peft_config", None) or {}


def _peft_layers(model: nn.Module) -> dict[str, nn.Module]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def _attach(model: nn.Module, name: str, layers: dict) -> None:
    """Gives the modules named in `layers` peft's layers, then fills these."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=1, lora_alpha=1, init_lora_weights=False, target_modules=sorted(layers))
    inject_adapter_in_model(config, model, name, low_cpu_mem_usage=True)  # empty: no memory, no random numbers
    model._hf_peft_config_loaded = True  # diffusers' and transformers' mark of a model with adapters
    for module, layer in _peft_layers(model).items():
        if module in layers:
            first, second, rank, alpha = layers[module].modules(layer.get_base_layer())
            layer.lora_A[name], layer.lora_B[name], layer.r[name], layer.lora_alpha[name] = first, second, rank, alpha
