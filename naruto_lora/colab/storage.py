"""Where results are saved: this machine's disk and Google Drive, the run to resume, the LoRA that a form names."""

from __future__ import annotations

from pathlib import Path

from .. import checkpoint, hub, lora
from ..files import make_folder
from .machine import on_colab


def places(folder: str, drive: bool = True) -> tuple[Path, Path | None]:
    """(folder to train in, the mirror that outlives this machine or None) for runs under `folder`.

    On Colab runs are trained on the machine's own disk; with `drive` the mirror is on Google Drive, if the user allows
    it. Absolute paths stay as they are. Raises PermissionError if a folder can't be written to.
    """
    path = Path(folder).expanduser()
    if not (on_colab() and drive) or path.is_absolute():
        make_folder(path)
        return path.resolve(), None
    here, mirror = Path("/content") / path, _on_drive(path)
    for place in (here, mirror):
        if place:
            make_folder(place)
    return here, mirror


def _on_drive(path: Path) -> Path | None:
    """The project's folder `path` on Google Drive; None, and a printed reason, if Drive can't be mounted."""
    from google.colab import drive

    try:
        drive.mount("/content/drive")
    except Exception as error:  # refused in the dialog, no browser, a mountpoint with files in it
        print(f"Google Drive is not mounted ({error or type(error).__name__}): run this cell again to allow it")
        return None
    return Path("/content/drive/MyDrive/naruto_lora") / path


def begun(recipe, folder: Path, mirror: Path | None = None) -> dict | None:
    """The state of the newest usable checkpoint of `recipe`'s run, here or in the mirror; None without one."""
    newest = checkpoint.newest([place / recipe.name for place in (folder, mirror) if place], _Silent())
    return checkpoint.read_state(newest) if newest else None


def done(recipe, folder: Path, mirror: Path | None = None) -> int:
    """The step of the newest usable checkpoint of `recipe`'s run, here or in the mirror; 0 without one."""
    return (begun(recipe, folder, mirror) or {"step": 0})["step"]


def state(recipe, folder: Path, mirror: Path | None = None) -> str:
    """Two lines: where results are saved, and whether there is a run of `recipe` to resume."""
    kept = "and are copied to Google Drive at once" if mirror else "only on this machine's disk"
    if on_colab() and not mirror:
        kept += ", which Colab deletes after the session: download what you want to keep"
    found, name = done(recipe, folder, mirror), recipe.name
    run = f"There is no run of {name} yet."
    if found:
        run = f"{name} was found at step {found} of {recipe.steps}: training resumes from there."
    if found >= recipe.steps:
        run = f"{name} was found, and its training is complete (step {found})."
    return f"Results are saved in the folder '{folder.name}' {kept}.\n{run}"


class _Silent:
    def note(self, text: str) -> None:
        pass


def find_adapter(name: str, folder: Path, mirror: Path | None = None) -> Path | str:
    """Where the LoRA `name` is: a run's name here or on Drive, a path, or a hub id; '' means the newest run's.

    Raises FileNotFoundError, which says how to get one.
    """
    places = [place for place in (folder, mirror) if place]
    if name:
        candidates = [*(place / name for place in places), Path(name).expanduser()]
        found = [path for path in candidates if path.is_file() or (path / lora.FILE).is_file()]
        if not found and hub.is_id(name):
            return hub.adapter(name)
    else:
        files = [file for place in places for file in place.glob(f"*/{lora.FILE}")]
        dated = [(at, file.parent) for file in files if (at := _changed(file)) is not None]
        found = [path for _, path in sorted(dated, reverse=True)]
    if found:
        return found[0]
    raise FileNotFoundError(
        f"there is no LoRA {f'called {name!r}' if name else 'yet'} in '{folder.name}': run 02_train_256 or "
        "03_train_1024 first (on Colab with `drive` on, so that it is found here), or set the parameter to a folder, "
        "a .safetensors file or a hub id. Without a GPU, `bash colab_setup.sh run` trains two small ones and runs "
        "this notebook with them"
    )


def _changed(file: Path) -> float | None:
    """When a file was last changed; None if another process has just removed it."""
    try:
        return file.stat().st_mtime
    except FileNotFoundError:
        return None
