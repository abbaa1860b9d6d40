"""A run on disk: checkpoints with checksums, the run's folder and mirror, and what may change when it resumes.

`checkpoint-<n>` holds the state after n updates, in safetensors and JSON, without pickle.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import time
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from . import data, files, lora, models
from .disk.owner import Claim, Taken
from .memory.optimizer import flatten, load_flat, misfit
from .progress import Listener, note

KEEP = 3  # newest checkpoints that are kept, beside the best one
FILES = (lora.FILE, "optimizer.safetensors", "state.json")
SUMS = "SHA256SUMS"  # as sha256sum writes it: `sha256sum -c SHA256SUMS` checks a checkpoint by hand
FREE_TO_CHANGE = (  # fields, when a run resumes; legs, base, vae and dataset are compared by content, not by name
    "name", "legs", "save_every", "save_minutes", "measure_every", "previews", "max_minutes", "expect",
    "batch", "accumulation", "base", "vae", "dataset",
)  # fmt: skip


def save(folder: Path, step: int, unet, optimizer, state: dict) -> Path:
    """Writes `folder`/checkpoint-<step>: adapter in diffusers' format, optimizer, `state`, and their checksums.

    Raises OSError.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _written(folder / f"checkpoint-{step}") as temporary:
            lora.save(unet, temporary)
            save_file(flatten(optimizer), temporary / "optimizer.safetensors")
            (temporary / "state.json").write_text(json.dumps(state | {"step": step}), encoding="utf-8")
            (temporary / SUMS).write_text(_sums(temporary), encoding="utf-8")
            for name in (*FILES, SUMS):
                files.flush(temporary / name)
    except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
        raise OSError(getattr(error, "strerror", None) or str(error)) from None
    return folder / f"checkpoint-{step}"


@contextlib.contextmanager
def _written(final: Path):
    """A folder to write to, then renamed to `final`: a kill never damages a checkpoint. Removes what was there last."""
    temporary, old = final.with_name(f".writing-{step_of(final)}"), final.with_name(f".old-{final.name}")
    _remove(temporary)
    temporary.mkdir()
    try:
        yield temporary
        _remove(old)
        if os.path.lexists(final):
            final.rename(old)
        temporary.rename(final)
    except (OSError, SafetensorError):
        _remove(temporary)
        raise
    files.flush(final.parent)
    _remove(old)


def _remove(path: Path, empty_first: bool = False) -> None:
    """Removes a folder, if it can; of a link only itself, never what it leads to."""
    if path.is_symlink() or path.is_file():
        return path.unlink(missing_ok=True)
    for file in path.glob("*") if empty_first else ():
        if file.is_file() and not file.is_symlink():
            file.write_bytes(b"")
    shutil.rmtree(path, ignore_errors=True)


def find(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, found by name only, oldest first; `problem` says which can be used. No links."""
    named = [p for p in Path(folder).glob("checkpoint-*") if re.fullmatch("0|[1-9][0-9]{0,8}", p.name[11:])]
    return sorted((p for p in named if p.is_dir() and not p.is_symlink()), key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name[11:])


def problem(checkpoint: Path) -> str | None:
    """Why `checkpoint` can't be used; None if every file is there and has its checksum."""
    try:
        stored, actual = (checkpoint / SUMS).read_bytes().decode(), _sums(checkpoint)
        if stored != actual:
            wrong = [line[66:] for line in actual.splitlines() if line not in stored.splitlines()]
            return f"{' and '.join(wrong) or SUMS} damaged"
        if read_state(checkpoint)["step"] != step_of(checkpoint):
            return f"its state is that of step {read_state(checkpoint)['step']!r:.40}"
        return misfit(checkpoint / FILES[1], checkpoint / lora.FILE, step_of(checkpoint))
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        return f"it can't be read ({error!s:.99})"


def _sums(folder: Path) -> str:
    return "".join(f"{files.sha256(folder / name)}  {name}\n" for name in FILES)


def newest(folders: list[Path], show=None) -> Path | None:
    """The newest usable checkpoint in all `folders`; of two with the same step, the first folder's.

    Reports each newer one that can't be used, and why, through `show.note`.
    """
    found = [path for folder in folders for path in find(folder)]
    for path in sorted(found, key=step_of, reverse=True):
        reason = problem(path)
        if reason is None:
            return path
        note(show, f"{path} is skipped: {reason}")
    return None


def fetch(checkpoint: Path, folder: Path) -> Path:
    """Copies a checkpoint into `folder`; it gets its name after each file has read back equal. Raises OSError."""
    with _written(folder / checkpoint.name) as temporary:
        for name in (*FILES, SUMS):
            files.copy_whole(checkpoint / name, temporary / name)
    return folder / checkpoint.name


def rotate(folder: Path, step: int, best: int | None = None, keep: int = KEEP, empty_first: bool = False) -> None:
    """Removes checkpoints before `step`, except the `keep` newest up to `step` and the one of step `best`.

    Checkpoints past `step` stay: they were skipped as damaged, and the run overwrites them when it gets there.
    `empty_first` empties files before removing them, because Google Drive's trash counts against its space.
    """
    older = [path for path in find(folder) if step_of(path) <= step]
    for path in older[:-keep]:
        if step_of(path) == best:
            continue
        old = path.with_name(f".old-{path.name}")
        _remove(old)
        with contextlib.suppress(FileNotFoundError):  # another run has just removed it
            path.rename(old)
        _remove(old, empty_first)


def check_disk(out: Path, parameters: list) -> None:
    """Raises OSError if the run's checkpoints don't fit on the disk of `out`."""
    numbers = sum(p.numel() for p in parameters)
    size = numbers * (4 + (2.1 if parameters[0].is_cuda else 8))  # bytes: fp32 LoRA, Adam's two moments
    needed = size * max(2, KEEP + 3 - len(find(out)))
    free = shutil.disk_usage(out).free
    if free < needed:
        raise OSError(
            f"the disk of '{out}' has {free / 1e9:.2f} GB free, and the run's checkpoints need {needed / 1e9:.2f} GB: "
            f"make room, or choose another folder"
        )


def remove_leftovers(folder: Path) -> None:
    """Removes what a killed run left half written or half removed."""
    for path in [*folder.glob(".writing-*"), *folder.glob(".old-*")]:
        _remove(path)


def read_state(checkpoint: Path) -> dict:
    """The `state` that `save` got, and its 'step'."""
    return json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))


def restore(checkpoint: Path, unet, optimizer) -> None:
    """Loads a checkpoint's adapter and optimizer state, bit for bit, into `unet` and `optimizer`."""
    lora.restore(unet, checkpoint)
    load_flat(optimizer, load_file(checkpoint / "optimizer.safetensors"))


class RunFolder:
    """A run's folder `out`, and its `mirror` (on Google Drive), which outlives this machine; both are its own.

    A mirror that is missing, full or unreadable is reported once and does not stop the run. Raises PermissionError if
    `out` can't be written, and Taken if another run is at work in one of the two. `close` gives them back.
    """

    def __init__(self, out: str | Path, mirror: str | Path | None = None, show=None):
        self.out, self.mirror = Path(out), Path(mirror) if mirror else None
        if self.mirror and self.mirror.resolve() == self.out.resolve():
            self.mirror = None
        self.show = show if isinstance(show, Listener) else Listener(show)
        self.saved_step: int | None = None  # the newest checkpoint's step
        self.saved_at, self.mirrored = time.monotonic(), 0  # its time; the newest step in the mirror, 0: none
        files.make_folder(self.out)
        self.claims = [Claim(folder, self.show) for folder in (self.out, self.mirror) if folder]
        self.claims[0].hold(wait=True)
        if self.mirror:
            self._prepare_mirror(self.mirror)

    def _prepare_mirror(self, mirror: Path) -> None:
        """Creates the mirror if its parent exists."""
        try:
            mirror.mkdir(exist_ok=True)
            files.make_folder(mirror)
            self.claims[1].hold(wait=True)
            remove_leftovers(mirror)
        except Taken:
            self.close()
            raise
        except OSError as error:
            reason = getattr(error.__context__, "strerror", None) or error.strerror or error
            self.show.note(f"the mirror '{mirror}' can't be used ({reason}); each checkpoint tries it again")

    def newest(self) -> list[Path]:
        """The newest usable checkpoints of `out` and of the mirror: the newer one first, or `out`'s if equal."""
        remove_leftovers(self.out)
        found = [self._newest_in(folder) for folder in (self.out, self.mirror) if folder]
        return sorted(filter(None, found), key=step_of, reverse=True)

    def _newest_in(self, folder: Path) -> Path | None:
        try:
            return newest([folder], self.show)
        except OSError as error:
            self.show.note(f"'{folder}' can't be read ({error.strerror or error}); its checkpoints are skipped")
            return None

    def local(self, checkpoint: Path) -> Path:
        """`checkpoint`, copied to `out` if it is the mirror's, and with it the best one and previews that lack here.

        Raises OSError if it can't be read.
        """
        local = checkpoint if checkpoint.parent == self.out else fetch(checkpoint, self.out)
        with contextlib.suppress(OSError):  # useful, but not needed
            best = f"checkpoint-{read_state(local)['record']['best_step']}"
            for path in find(self.mirror) if self.mirror else ():
                if path.name == best and problem(self.out / best) and problem(path) is None:
                    fetch(path, self.out)
            for path in (self.mirror / "previews").glob("step-*.jpg") if self.mirror else ():
                if not (copy := self.out / "previews" / path.name).exists():
                    copy.parent.mkdir(exist_ok=True)
                    files.copy_whole(path, copy)
        return local

    def save(self, step: int, unet, optimizer, state: dict) -> None:
        """Writes checkpoint-<step> with `state`, here and in the mirror; removes old ones. Raises OSError, Taken."""
        self.claims[0].hold()
        best = state["record"]["best_step"]
        path = self._write(step, unet, optimizer, state, best)
        self.saved_step, self.saved_at = step, time.monotonic()
        rotate(self.out, step, best)
        self.mirror_checkpoint(path, best)

    def _write(self, step: int, unet, optimizer, state: dict, best: int | None) -> Path:
        try:
            return save(self.out, step, unet, optimizer, state)
        except OSError:  # a full disk: make room
            rotate(self.out, self.saved_step or 0, best, keep=1)
        try:
            return save(self.out, step, unet, optimizer, state)
        except OSError as error:
            raise OSError(
                f"checkpoint-{step} can't be written to '{self.out}' ({error}): make room and run it again to "
                f"continue from step {self.saved_step}"
            ) from None

    def mirror_checkpoint(self, path: Path, best: int | None) -> None:
        """Copies a checkpoint of `out`, and the one of step `best`, to the mirror; removes old ones there."""
        if self.mirror is None:
            return
        with self._mirroring():
            self.claims[1].hold()
            for source in reversed([p for p in find(self.out) if step_of(p) in (step_of(path), best)]):
                self._copy_to(self.mirror, source, best)
            rotate(self.mirror, step_of(path), best, empty_first=True)

    def _copy_to(self, mirror: Path, source: Path, best: int | None) -> None:
        """Copies a checkpoint, unless it is there; if that fails, makes room there and tries once more."""
        copy = mirror / source.name
        if problem(copy) or (copy / SUMS).read_bytes() != (source / SUMS).read_bytes():
            try:
                fetch(source, mirror)
            except OSError:  # full, perhaps: the newest that is whole stays, and the best
                whole = next((p for p in reversed(find(mirror)) if problem(p) is None), None)
                self.mirrored = step_of(whole) if whole else 0
                rotate(mirror, self.mirrored, best, keep=1, empty_first=True)
                fetch(source, mirror)
        self.mirrored = max(self.mirrored, step_of(source))

    def mirror_file(self, path: Path) -> None:
        """Copies a file of `out` to the same place in the mirror."""
        if self.mirror is None:
            return
        with self._mirroring():
            self.claims[1].hold()
            target = self.mirror / path.relative_to(self.out)
            target.parent.mkdir(exist_ok=True)
            files.copy_whole(path, target)

    @contextlib.contextmanager
    def _mirroring(self):
        try:
            yield
        except (OSError, Taken) as error:
            reason = getattr(error, "strerror", None) or error
            safe = f"; step {self.mirrored} is safe there" if self.mirrored else ""
            self.show.once(f"no copy in the mirror '{self.mirror}' ({reason}); the run continues{safe}", f"{reason}")

    def finish(self, unet, recipe, record: dict) -> None:
        """Writes the LoRA's two files and run.json, here and in the mirror. Raises OSError."""
        try:
            for file in self._write_adapter(unet, recipe, record):
                self.mirror_file(file)
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"the LoRA can't be written to '{self.out}' ({error}): make room; its weights are {self.saved_where()}"
            ) from None

    def _write_adapter(self, unet, recipe, record: dict) -> list[Path]:
        """Writes into a temporary folder, then moves the files into `out`; returns them."""
        temporary = self.out / ".writing-adapter"
        shutil.rmtree(temporary, ignore_errors=True)  # a killed run may have left broken files there
        temporary.mkdir()
        lora.save(unet, temporary)
        lora.save_kohya(unet, temporary / record["file"], recipe.alpha, record)
        (temporary / "run.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
        for file in temporary.iterdir():
            files.flush(file)
        written = [file.replace(self.out / file.name) for file in sorted(temporary.iterdir())]
        temporary.rmdir()
        return written

    def close(self) -> None:
        """Gives the folder and the mirror back to other runs."""
        for claim in self.claims:
            claim.release()

    def saved_where(self) -> str:
        """Where the newest checkpoint is, to end a message."""
        return f"saved in '{self.out / f'checkpoint-{self.saved_step}'}': run it again to continue"


def sources_of(recipe, examples: list[data.Example], held: list[data.Example]) -> dict[str, str]:
    """The pictures and models that a run depends on, identified by content and not by path."""
    return {
        "dataset": f"{len(examples)} training pictures, {data.fingerprint(examples)}",
        "holdout": f"{len(held)} pictures, {data.fingerprint(held)}",
        "base": models.identity(recipe.base)[:16],
        "vae": models.identity(recipe.vae or recipe.base)[:16],
    }


def refuse_changes(recipe, sources: dict, state: dict, folder: Path) -> None:
    """Raises ValueError, with the field and both values, if the run in `folder` was trained with other settings."""

    def same(field: str, old, new) -> None:
        if old != new:
            conflict = f"the run in '{folder}' was begun with {field} {old!r}, not {new!r}"
            raise ValueError(f"{conflict}: use the old value or another folder")

    if "sources" not in state:
        raise ValueError(f"the run in '{folder}' was begun by an earlier version of naruto_lora: use another folder")
    new, done = json.loads(recipe.to_json()), state["step"]
    if unknown := [*(state["recipe"].keys() - new), *(state["sources"].keys() - sources)]:
        newer = f"was begun by a newer version of naruto_lora, with {', '.join(sorted(unknown))}"
        raise ValueError(f"the run in '{folder}' {newer}: update naruto_lora, or use another folder")
    old = {f.name: f.default for f in dataclasses.fields(recipe)} | state["recipe"]
    for field, value in new.items():
        if field not in FREE_TO_CHANGE:
            same(field, old[field], value)
    same("batch * accumulation", old["batch"] * old["accumulation"], recipe.pictures_per_step)
    for field, value in state["sources"].items():
        if value != sources[field]:
            same(field, f"{old[field]} ({value})", f"{new[field]} ({sources[field]})")
    if done > recipe.steps:
        past = f"past the {recipe.steps} of recipe '{recipe.name}'"
        raise ValueError(f"the run in '{folder}' is at step {done}, {past}: use another folder")
    before = recipe.replace(legs=old["legs"])
    for k in range(done):
        rates = (float(f"{one.learning_rate(k):.9g}") for one in (before, recipe))
        same(f"legs whose learning rate in step {k + 1} is", *rates)
