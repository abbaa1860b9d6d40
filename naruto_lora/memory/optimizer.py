"""The optimizer that fits the machine, and its state as flat tensors, which a checkpoint keeps."""

from __future__ import annotations

import torch


def make_optimizer(parameters, device: torch.device) -> torch.optim.Optimizer:
    """8-bit AdamW (bitsandbytes, arXiv 2110.02861) on CUDA; on the CPU torch's AdamW, the same in 32 bits."""
    if device.type != "cuda":
        return torch.optim.AdamW(parameters, weight_decay=1e-2, fused=True)
    try:
        from .adam import JoinedAdamW8bit
    except ImportError:
        raise RuntimeError("8-bit Adam needs bitsandbytes, which is not installed: pip install bitsandbytes") from None
    return JoinedAdamW8bit(parameters, weight_decay=1e-2)


def flatten(optimizer) -> dict[str, torch.Tensor]:
    """Its state as {"<parameter's index>.<name>.<tensor or number>": tensor}, on the CPU."""
    flat = {}
    for index, values in optimizer.state_dict()["state"].items():
        nested = [value for value in values.values() if isinstance(value, dict)]  # bitsandbytes nests its tensors
        plain = {name: value for name, value in values.items() if not isinstance(value, dict)}
        for name, value in {k: v for part in (plain, *nested) for k, v in part.items()}.items():
            kind = "tensor" if torch.is_tensor(value) else "number"
            flat[f"{index}.{name}.{kind}"] = torch.as_tensor(value).detach().to("cpu", copy=True).contiguous()
    return flat


def load_flat(optimizer, flat: dict[str, torch.Tensor]) -> None:
    """Gives `optimizer` the state that `flatten` returned, and no other."""
    state = optimizer.state_dict()
    state["state"] = {}
    for key, value in flat.items():
        index, name, kind = key.split(".")
        state["state"].setdefault(int(index), {})[name] = value.clone() if kind == "tensor" else value.item()
    optimizer.load_state_dict(state)
