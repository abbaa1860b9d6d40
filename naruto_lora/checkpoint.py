"""Checkpoints: `checkpoint-<n>` after n updates, whole or passed over. Safetensors and JSON, no pickle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from . import files, lora

KEEP = 3  # newest ones, beside the best
FILES = (lora.FILE, "optimizer.safetensors", "state.json")
SUMS = "SHA256SUMS"  # as sha256sum writes it: `sha256sum -c SHA256SUMS` checks a checkpoint by hand


def save(folder: Path, step: int, unet, optimizer, state: dict) -> Path:
    """Writes `folder`/checkpoint-<step>: adapter in diffusers' format, optimizer, `state`, and their checksums.

    Written beside, flushed, then renamed: a kill at any moment leaves the older ones whole. Raises OSError.
    """
    final, temporary = folder / f"checkpoint-{step}", folder / f".writing-{step}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        lora.save(unet, temporary)
        save_file(_flatten(optimizer), temporary / "optimizer.safetensors")
        (temporary / "state.json").write_text(json.dumps(state | {"step": step}), encoding="utf-8")
        (temporary / SUMS).write_text(_sums(temporary), encoding="utf-8")
        for name in (*FILES, SUMS):
            files.flush(temporary / name)
        _put(temporary, final)
    except (OSError, SafetensorError) as error:  # safetensors tells of a full disk in its own way
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(getattr(error, "strerror", None) or str(error)) from None
    return final


def _put(temporary: Path, final: Path) -> None:
    """Renames a finished folder into its place; what was there before goes only afterwards."""
    old = final.with_name(f".old-{final.name}")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    temporary.rename(final)
    files.flush(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def find(folder: Path) -> list[Path]:
    """The checkpoints in `folder` by their names alone, oldest first; `problem` says which can be used."""
    named = [p for p in Path(folder).glob("checkpoint-*") if p.name[11:].isdigit()]
    return sorted(named, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name[11:])


def problem(checkpoint: Path) -> str | None:
    """Why `checkpoint` can't be used, or None if every file is there with its checksum."""
    try:
        stored, actual = (checkpoint / SUMS).read_bytes().decode(), _sums(checkpoint)
        if stored != actual:
            wrong = [line[66:] for line in actual.splitlines() if line not in stored.splitlines()]
            return f"{' and '.join(wrong) or SUMS} damaged"
        if read_state(checkpoint)["step"] != step_of(checkpoint):
            return f"it is of step {read_state(checkpoint)['step']}"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError) as error:
        return f"it can't be read ({error})"
    return None


def _sums(folder: Path) -> str:
    return "".join(f"{files.sha256(folder / name)}  {name}\n" for name in FILES)


def newest(folders: list[Path], show=None) -> Path | None:
    """The newest usable checkpoint of all `folders`, the first folder's where two are equal.

    Each newer one that is damaged is told of with its reason, through `show.note`.
    """
    found = [path for folder in folders for path in find(folder)]
    for path in sorted(found, key=step_of, reverse=True):
        reason = problem(path)
        if reason is None:
            return path
        files.tell(show, f"{path} is passed over: {reason}")
    return None


def fetch(checkpoint: Path, folder: Path) -> Path:
    """Copies a checkpoint into `folder`, where it counts only once each file has been read back. Raises OSError."""
    temporary, final = folder / f".writing-{step_of(checkpoint)}", folder / checkpoint.name
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        for name in (*FILES, SUMS):
            files.copy_whole(checkpoint / name, temporary / name)
        _put(temporary, final)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def rotate(folder: Path, step: int, best: int | None = None, keep: int = KEEP, emptied: bool = False) -> None:
    """Removes all but the `keep` newest checkpoints up to `step`, the one of step `best`, and any past `step`.

    Those past it were passed over on resuming; they are left for a second look until the run reaches them.
    With `emptied` files are emptied before they go: Google Drive counts what lies in its trash.
    """
    older = [path for path in find(folder) if step_of(path) <= step]
    for path in older[:-keep]:
        if step_of(path) == best:
            continue
        gone = path.with_name(f".old-{path.name}")
        shutil.rmtree(gone, ignore_errors=True)
        path.rename(gone)
        for file in gone.iterdir() if emptied else ():
            file.write_bytes(b"")
        shutil.rmtree(gone)


def enough_disk(out: Path, parameters: list) -> None:
    """Raises OSError if the run's checkpoints won't fit on the disk of `out`."""
    numbers = sum(p.numel() for p in parameters)
    each = numbers * (4 + (2.1 if parameters[0].is_cuda else 8))  # bytes: fp32 LoRA, Adam's two moments
    needed = each * max(2, KEEP + 3 - len(find(out)))
    free = shutil.disk_usage(out).free
    if free < needed:
        raise OSError(
            f"the disk of '{out}' has {free / 1e9:.2f} GB free, and the run's checkpoints need {needed / 1e9:.2f} GB: "
            f"make room, or choose another folder"
        )


def tidy(folder: Path) -> None:
    """Removes what a killed run left half written or half removed."""
    for left in [*folder.glob(".writing-*"), *folder.glob(".old-*")]:
        shutil.rmtree(left, ignore_errors=True)


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
        state["state"].setdefault(int(index), {})[name] = value.clone() if kind == "tensor" else value.item()
    optimizer.load_state_dict(state)


def _flatten(optimizer) -> dict[str, torch.Tensor]:
    flat = {}
    for index, values in optimizer.state_dict()["state"].items():
        nested = [value for value in values.values() if isinstance(value, dict)]  # bitsandbytes wraps its own
        plain = {name: value for name, value in values.items() if not isinstance(value, dict)}
        for name, value in {k: v for part in (plain, *nested) for k, v in part.items()}.items():
            kind = "tensor" if torch.is_tensor(value) else "number"
            flat[f"{index}.{name}.{kind}"] = torch.as_tensor(value).detach().to("cpu", copy=True).contiguous()
    return flat
