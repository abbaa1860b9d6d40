"""A run on disk: checkpoints, whole or skipped; its folder and mirror; what may change when it is resumed.

`checkpoint-<n>` holds the state after n updates, in safetensors and JSON, without pickle.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import time
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from . import data, files, lora, models
from .progress import Listener, note

KEEP = 3  # newest ones, beside the best
FILES = (lora.FILE, "optimizer.safetensors", "state.json")
SUMS = "SHA256SUMS"  # as sha256sum writes it: `sha256sum -c SHA256SUMS` checks a checkpoint by hand
FREE_TO_CHANGE = (  # when a run is resumed; legs, base, vae and dataset are compared by content, not by name
    "name", "legs", "save_every", "save_minutes", "measure_every", "previews", "max_minutes", "expect",
    "batch", "accumulation", "base", "vae", "dataset",
)  # fmt: skip


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
        note(show, f"{path} is skipped: {reason}")
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


class RunFolder:
    """A run's two places: its folder `out`, and the mirror (on Google Drive), where it outlives this machine.

    A mirror that is missing, full or unreadable is reported once and stops nothing. Raises PermissionError if `out`
    can't be written.
    """

    def __init__(self, out: str | Path, mirror: str | Path | None = None, show=None):
        self.out, self.mirror = Path(out), Path(mirror) if mirror else None
        self.show = show if isinstance(show, Listener) else Listener(show)
        self.saved, self.saved_at = None, time.time()  # the newest checkpoint's step, and when it was written
        files.writable(self.out)
        if self.mirror:
            self._prepare_mirror()

    def _prepare_mirror(self) -> None:
        """Makes the mirror if its parent exists."""
        try:
            self.mirror.mkdir(exist_ok=True)
            files.writable(self.mirror)
            tidy(self.mirror)
        except OSError as error:
            reason = error.strerror or error
            self.show.note(f"the mirror '{self.mirror}' can't be used ({reason}); each checkpoint tries it again")

    def newest(self) -> list[Path]:
        """The newest usable checkpoint of each place, the newer one first; `out`'s where both are of one step."""
        tidy(self.out)
        found = [self._newest_in(place) for place in (self.out, self.mirror) if place]
        return sorted(filter(None, found), key=step_of, reverse=True)

    def _newest_in(self, place: Path) -> Path | None:
        try:
            return newest([place], self.show)
        except OSError as error:
            self.show.note(f"'{place}' can't be read ({error.strerror or error}); its checkpoints are skipped")
            return None

    def bring(self, found: Path) -> Path:
        """The checkpoint `found` in `out`. One of the mirror is copied, with the best checkpoint and the previews.

        Raises OSError if it can't be read.
        """
        if found.parent == self.out:
            return found
        fetch(found, self.out)
        with contextlib.suppress(OSError):  # these are good to have, but not needed
            best = found.with_name(f"checkpoint-{read_state(found)['record']['best_step']}")
            if best != found and problem(best) is None:
                fetch(best, self.out)
            (self.out / "previews").mkdir(exist_ok=True)
            for path in (found.parent / "previews").glob("step-*.jpg"):
                files.copy_whole(path, self.out / "previews" / path.name)
        return self.out / found.name

    def save(self, step: int, unet, optimizer, state: dict) -> None:
        """Writes checkpoint-<step> with `state` here and in the mirror, and drops the oldest. Raises OSError."""
        best = state["record"]["best_step"]
        path = self._write(step, unet, optimizer, state, best)
        self.saved, self.saved_at = step, time.time()
        rotate(self.out, step, best)
        self.mirror_checkpoint(path, best)

    def _write(self, step: int, unet, optimizer, state: dict, best: int | None) -> Path:
        try:
            return save(self.out, step, unet, optimizer, state)
        except OSError:  # a full disk: older checkpoints make room
            rotate(self.out, self.saved or 0, best, keep=1)
        try:
            return save(self.out, step, unet, optimizer, state)
        except OSError as error:
            raise OSError(
                f"checkpoint-{step} can't be written to '{self.out}' ({error}), the newest there is of step "
                f"{self.saved}: make room and run it again to continue from it"
            ) from None

    def mirror_checkpoint(self, path: Path, best: int | None) -> None:
        """Copies a checkpoint of `out`, and the one of step `best`, to the mirror; drops the oldest there."""
        if self.mirror is None:
            return
        with self._mirroring():
            for each in {path, path.with_name(f"checkpoint-{best}")}:
                if each.is_dir() and problem(self.mirror / each.name):
                    fetch(each, self.mirror)
            rotate(self.mirror, step_of(path), best, emptied=True)

    def mirror_file(self, path: Path) -> None:
        """Copies a file of `out` to its place in the mirror."""
        if self.mirror is None:
            return
        with self._mirroring():
            target = self.mirror / path.relative_to(self.out)
            target.parent.mkdir(exist_ok=True)
            files.copy_whole(path, target)

    @contextlib.contextmanager
    def _mirroring(self):
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            self.show.once(f"no copy in the mirror '{self.mirror}' ({reason}); the run continues")

    def finish(self, unet, recipe, record: dict) -> None:
        """Writes the LoRA's two files and run.json, here and in the mirror. Raises OSError."""
        try:
            for file in self._write_adapter(unet, recipe, record):
                self.mirror_file(file)
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"the LoRA can't be written to '{self.out}' ({error}): make room; its weights are {self.where()}"
            ) from None

    def _write_adapter(self, unet, recipe, record: dict) -> list[Path]:
        """Written beside, then put into `out`."""
        beside = self.out / ".writing-adapter"
        shutil.rmtree(beside, ignore_errors=True)  # of a killed end: its files may be cut short
        beside.mkdir()
        lora.save(unet, beside)
        lora.save_kohya(unet, beside / f"{recipe.name}.safetensors", recipe.alpha)
        (beside / "run.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
        for file in beside.iterdir():
            files.flush(file)
        written = [file.replace(self.out / file.name) for file in sorted(beside.iterdir())]
        beside.rmdir()
        return written

    def where(self) -> str:
        """Where the newest checkpoint is, for a sentence."""
        return f"saved in '{self.out / f'checkpoint-{self.saved}'}': run it again to continue"


def sources_of(recipe, examples: list[data.Example], held: list[data.Example]) -> dict[str, str]:
    """What a run depends on beside the recipe's numbers, identified by content and not by place."""
    return {
        "dataset": f"{len(examples)} training pictures, {data.fingerprint(examples)}",
        "holdout": f"{len(held)} pictures, {data.fingerprint(held)}",
        "base": models.identity(recipe.base)[:16],
        "vae": models.identity(recipe.vae or recipe.base)[:16],
    }


def refuse_changes(recipe, sources: dict, state: dict, folder: Path) -> None:
    """Raises ValueError, with the field and both values, if the checkpoint's `state` was trained otherwise."""

    def same(field: str, old, new) -> None:
        if old != new:
            raise ValueError(
                f"the run in '{folder}' was begun with {field} {old!r}, not {new!r}: use that, or another folder"
            )

    if "sources" not in state:
        raise ValueError(f"the run in '{folder}' was begun by an earlier version of naruto_lora: use another folder")
    new, done = json.loads(recipe.to_json()), state["step"]
    old = {f.name: f.default for f in dataclasses.fields(recipe)} | state["recipe"]
    for field, value in new.items():
        if field not in FREE_TO_CHANGE:
            same(field, old[field], value)
    same("batch * accumulation", old["batch"] * old["accumulation"], recipe.pictures_per_step)
    for field, value in state["sources"].items():
        if value != sources[field]:
            same(field, f"{old[field]} ({value})", f"{new[field]} ({sources[field]})")
    if done > recipe.steps:
        raise ValueError(
            f"the run in '{folder}' is at step {done}, past the {recipe.steps} of recipe '{recipe.name}': "
            f"use another folder"
        )
    before = recipe.replace(legs=old["legs"])
    for k in range(done):
        rates = (float(f"{plan.learning_rate(k):.9g}") for plan in (before, recipe))
        same(f"legs whose learning rate in step {k + 1} is", *rates)
