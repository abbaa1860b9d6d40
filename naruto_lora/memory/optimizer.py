"""The optimizer that fits the machine, and its state as flat tensors, which a checkpoint keeps."""

from __future__ import annotations

import math
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

ADAM, ADAM_8BIT = ("exp_avg.tensor", "exp_avg_sq.tensor"), ("state1.tensor", "state2.tensor")  # the moments
BLOCK = 256  # values that share a scale in bitsandbytes' 8-bit moments


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
    """Gives `optimizer` the state that `flatten` returned, and no other.

    Raises ValueError, before it changes anything, for a state of other parameters or of another kind of optimizer.
    """
    shapes = [tuple(parameter.shape) for group in optimizer.param_groups for parameter in group["params"]]
    states = _by_parameter({key: (value.dtype, tuple(value.shape)) for key, value in flat.items()})
    on_cpu, from_cpu = isinstance(optimizer, torch.optim.AdamW), ADAM[0] in states.get(0, ())
    wrong = _misfit(states, shapes)
    if states and not wrong and on_cpu != from_cpu:
        wrong = f"was made on {'a CPU' if from_cpu else 'a GPU'}"
    if wrong:
        raise ValueError(f"the optimizer's state {wrong}: resume the run where it was begun, or use another folder")
    state = optimizer.state_dict()
    state["state"] = {}
    for key, value in flat.items():
        index, name, kind = key.split(".")
        state["state"].setdefault(int(index), {})[name] = value.clone() if kind == "tensor" else value.item()
    optimizer.load_state_dict(state)


def misfit(saved: Path, adapter: Path, step: int) -> str | None:
    """Why a checkpoint's optimizer file can't be used with its adapter file; None if it can. Reads their headers only.

    torch's fused Adam writes past the end of a moment that is shorter than its parameter, which aborts the process,
    and silently starts from zero for a parameter without moments. Only at `step` 0, before any update, is there none.
    """
    try:
        shapes, states = [shape for _, shape in _layouts(adapter).values()], _by_parameter(_layouts(saved))
    except (SafetensorError, ValueError) as error:
        return f"{adapter.name} or {saved.name} can't be read ({error!s:.80})"
    if not states:
        return f"{saved.name} is empty" if step > 0 else None
    own = [next((states[k][name][1] for name in (ADAM[0], ADAM_8BIT[0]) if name in states.get(k, ())), ())
           for k in range(len(shapes))]
    reason = _misfit(states, own) or ("fits other parameters" if sorted(own) != sorted(shapes) else None)
    return reason and f"{saved.name} {reason}"


Layouts = dict[str, tuple[object, tuple[int, ...]]]  # each tensor's dtype and shape, by its key


def _layouts(file: Path) -> Layouts:
    dtypes = {"F32": torch.float32, "U8": torch.uint8, "I64": torch.int64}  # those of `_misfit`
    with safe_open(file, "pt") as opened:
        slices = {key: opened.get_slice(key) for key in opened.keys()}
        return {key: (dtypes.get(part.get_dtype()), tuple(part.get_shape())) for key, part in slices.items()}


def _by_parameter(flat: Layouts) -> dict[int, Layouts]:
    """{parameter's index: {"<name>.<tensor or number>": layout}}. Raises ValueError for what `flatten` doesn't make."""
    states: dict[int, Layouts] = {}
    for key, layout in flat.items():
        index, _, name = key.partition(".")
        if not re.fullmatch(r"\d{1,9}", index) or not re.fullmatch(r"\w+\.(tensor|number)", name):
            raise ValueError(f"unknown tensor {key!r:.40}")
        if name.endswith("number") and layout[1] != ():
            raise ValueError(f"{key!r} is no single number")
        states.setdefault(int(index), {})[name] = layout
    return states


def _misfit(states: dict[int, Layouts], shapes: list[tuple[int, ...]]) -> str | None:
    """What is wrong with the states of parameters of these `shapes`; None if nothing is. No states at all are right."""
    if states and states.keys() != set(range(len(shapes))):
        return f"is that of {len(states)} parameters, not the {len(shapes)} of the LoRA"
    for index, state in sorted(states.items()):
        for name, layout in _wanted(state, shapes[index]).items():
            if name not in state:
                return f"lacks '{name}' of parameter {index}"
            if state[name] != layout:
                return f"has a '{name}' of another shape or type for parameter {index}"
    return None


def _wanted(state: Layouts, shape: tuple[int, ...]) -> Layouts:
    """What the state of a parameter must hold; bitsandbytes keeps small parameters' moments in 32 bits."""
    if ADAM[0] in state:
        return {name: (torch.float32, shape) for name in ADAM} | {"step.tensor": (torch.float32, ())}
    bits, number = state.get(ADAM_8BIT[0], (None,))[0], {"step.number": (torch.int64, ())}
    if bits != torch.uint8:
        return number | {name: (torch.float32, shape) for name in ADAM_8BIT}
    scales = {f"absmax{k}.tensor": (torch.float32, (-(-math.prod(shape) // BLOCK),)) for k in (1, 2)}
    values = {f"qmap{k}.tensor": (torch.float32, (BLOCK,)) for k in (1, 2)}  # a byte's 256 values
    return number | {name: (torch.uint8, shape) for name in ADAM_8BIT} | scales | values
