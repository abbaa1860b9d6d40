"""Where results are kept: this machine's disk and Google Drive, the run that is there, the LoRA that is meant."""

from __future__ import annotations

from pathlib import Path

from .. import checkpoint, hub, lora
from ..files import writable
from .machine import on_colab


def places(folder: str, drive: bool = True) -> tuple[Path, Path | None]:
    """(where to train, the mirror that outlives this machine or None) for runs under `folder`.

    On Colab training works on the machine's own disk; the mirror is on Drive, where that is wanted and somebody is
    there to allow it. Absolute paths stay. Raises PermissionError if nothing can be written there.
    """
    path = Path(folder).expanduser()
    if not (on_colab() and drive) or path.is_absolute():
        writable(path)
        return path.resolve(), None
    here, mirror = Path("/content") / path, _on_drive(path)
    for place in (here, mirror):
        if place:
            writable(place)
    return here, mirror


def _on_drive(path: Path) -> Path | None:
    """The folder `path` of the project's on Google Drive; None, with a line of why, if Drive isn't to be had."""
    from google.colab import drive

    try:
        drive.mount("/content/drive")
    except Exception as error:  # refused in the dialog, no browser, a mountpoint with files in it
        print(f"Google Drive is not mounted ({error or type(error).__name__}): run the cell again to allow it")
        return None
    return Path("/content/drive/MyDrive/naruto_lora") / path


def done(recipe, folder: Path, mirror: Path | None = None) -> int:
    """Steps that the newest usable checkpoint of `recipe`'s run has, here or in the mirror; 0 without one."""
    newest = checkpoint.newest([place / recipe.name for place in (folder, mirror) if place], _Silent())
    return checkpoint.step_of(newest) if newest else 0


def state(recipe, folder: Path, mirror: Path | None = None) -> str:
    """What is kept where, and whether a run of `recipe` to go on with was found, in two lines."""
    kept = "and copied to Google Drive as they come" if mirror else "on this machine's disk alone"
    if on_colab() and not mirror:
        kept += ", which goes with it: download what you want to keep"
    found, name = done(recipe, folder, mirror), recipe.name
    run = f"There is no run of {name} yet."
    if found:
        run = f"{name} was found at step {found} of {recipe.steps}: training goes on from there."
    if found >= recipe.steps:
        run = f"{name} was found trained to its end, step {found}."
    return f"Results are in the folder '{folder.name}', {kept}.\n{run}"


class _Silent:
    def note(self, text: str) -> None:
        pass


def find_adapter(name: str, folder: Path, mirror: Path | None = None) -> Path | str:
    """Where the LoRA `name` is: a run's name here or on Drive, a path, or a hub id; '' takes the newest run's.

    Raises FileNotFoundError that says how to get one.
    """
    places = [place for place in (folder, mirror) if place]
    if name:
        candidates = [*(place / name for place in places), Path(name).expanduser()]
        found = [path for path in candidates if path.is_file() or (path / lora.FILE).is_file()]
        if not found and hub.is_id(name):
            return hub.adapter(name)
    else:
        found = [file.parent for place in places for file in place.glob(f"*/{lora.FILE}")]
        found.sort(key=lambda path: (path / lora.FILE).stat().st_mtime, reverse=True)
    if found:
        return found[0]
    raise FileNotFoundError(
        f"there is no LoRA {f'called {name!r}' if name else 'yet'} in '{folder.name}': run 02_train_256 or "
        "03_train_1024 first (on Colab with Google Drive, so that it is found here), or set the parameter to a "
        "folder, a .safetensors file or a hub id; without a GPU, `bash colab_setup.sh run` trains two small ones and "
        "runs this notebook with them"
    )
