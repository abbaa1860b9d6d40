"""Checkpoints: `checkpoint-<n>` after n updates, whole or not there at all. Safetensors and JSON, no pickle."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from . import lora

KEEP = 3
FILES = (lora.FILE, "optimizer.safetensors", "state.json")


def save(folder: Path, step: int, unet, optimizer, state: dict) -> Path:
    """Writes `folder`/checkpoint-<step> (adapter in diffusers' format, optimizer, `state`) and drops the oldest.

    Written beside, flushed, then renamed, so that a kill at any moment leaves the older ones whole.
    """
    final, temporary = folder / f"checkpoint-{step}", folder / f".writing-{step}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    lora.save(unet, temporary)
    save_file(_flatten(optimizer), temporary / "optimizer.safetensors")
    (temporary / "state.json").write_text(json.dumps(state | {"step": step}), encoding="utf-8")
    for file in temporary.iterdir():
        with open(file, "rb+") as handle:
            os.fsync(handle.fileno())
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    for old in find(folder)[:-KEEP]:
        shutil.rmtree(old)
    return final


def find(folder: Path) -> list[Path]:
    """The checkpoints in `folder` that have all of their files, oldest first."""
    named = [p for p in Path(folder).glob("checkpoint-*") if p.name[11:].isdigit()]
    found = [path for path in named if all((path / name).is_file() for name in FILES)]
    return sorted(found, key=lambda path: int(path.name[11:]))


def read_state(checkpoint: Path) -> dict:
    """The `state` that was saved with it, and its 'step'."""
    return json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))


def restore(checkpoint: Path, unet, optimizer) -> None:
    """Puts a checkpoint's adapter and optimizer state, bit for bit, into `unet` and `optimizer`."""
    lora.restore(unet, checkpoint)
    stored = load_file(checkpoint / "optimizer.safetensors")
    state = optimizer.state_dict()
    state["state"] = {}
    for key, value in stored.items():
        index, name, kind = key.split(".")
        state["state"].setdefault(int(index), {})[name] = value if kind == "tensor" else value.item()
    optimizer.load_state_dict(state)


def _flatten(optimizer) -> dict[str, torch.Tensor]:
    flat = {}
    for index, values in optimizer.state_dict()["state"].items():
        nested = [value for value in values.values() if isinstance(value, dict)]  # bitsandbytes wraps its own
        plain = {name: value for name, value in values.items() if not isinstance(value, dict)}
        for name, value in {k: v for part in (plain, *nested) for k, v in part.items()}.items():
            kind = "tensor" if torch.is_tensor(value) else "number"
            flat[f"{index}.{name}.{kind}"] = torch.as_tensor(value).detach().cpu().contiguous()
    return flat
