"""What the machine is: GPU, memory, disk; and where results are safe on Colab."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import os
import platform
import re
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from . import checkpoint, hub, lora
from .files import writable

SHARED = (lora.FILE, "*.safetensors", "run.json", "README.md", "*.jpg")  # what of a run's folder goes to the hub


def on_colab() -> bool:
    """Whether this is Colab's kernel (Kaggle sets COLAB variables too, but has no google.colab)."""
    try:
        return bool(os.environ.get("COLAB_RELEASE_TAG")) and importlib.util.find_spec("google.colab") is not None
    except ModuleNotFoundError:  # not even a google package
        return False


def check_parameters(cells: list[str] | None = None) -> None:
    """Raises ValueError, with the nearest name, for a parameter that papermill gave and the notebook doesn't have.

    `cells` are the sources that ran so far, by default this notebook's: the form, whose lines say `@param`, and the
    cell that papermill puts after it. Papermill itself only warns.
    """
    if cells is None:
        from IPython import get_ipython

        cells = get_ipython().user_ns["In"]
    declared = {name for cell in cells if "# @param" in cell for name in _assigned(cell)}
    given = {name for cell in cells if cell.startswith("# Parameters\n") for name in _assigned(cell)}
    for name in sorted(given - declared) if declared else ():
        near = difflib.get_close_matches(name, declared, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(sorted(declared))}"
        raise ValueError(f"this notebook has no parameter '{name}': {hint}")


def _assigned(cell: str) -> list[str]:
    """The names that a cell's top level assigns; none if it isn't plain Python."""
    try:
        body = ast.parse(cell).body
    except SyntaxError:
        return []
    return [target.id for node in body if isinstance(node, ast.Assign) for target in node.targets
            if isinstance(target, ast.Name)]


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
        if not found and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
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


def download(file: str | Path, interactive: bool = True) -> None:
    """Offers `file` in Colab's browser; elsewhere, or with nobody there, says in which folder it is."""
    if on_colab() and interactive:
        from google.colab import files

        files.download(str(file))
    else:
        print(f"{Path(file).name} is in the folder '{Path(file).parent.name}'")


def push(folder: str | Path, repository: str) -> None:
    """Uploads a run's LoRA, record and model card to the hub as `repository`; '' does nothing.

    Raises PermissionError, which says what is missing, without a token that may write.
    """
    if not repository:
        print("not pushed to the hub: `push_to` is empty")
        return
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    try:
        HfApi().create_repo(repository, exist_ok=True)
        HfApi().upload_folder(repo_id=repository, folder_path=str(folder), allow_patterns=list(SHARED))
    except (HfHubHTTPError, LocalTokenNotFoundError) as error:
        raise PermissionError(
            f"the hub refuses to write '{repository}' ({type(error).__name__}): make a token that may write at "
            "https://huggingface.co/settings/tokens and put it into Colab's secrets as HF_TOKEN"
        ) from None
    print(f"https://huggingface.co/{repository}")


def end(wanted: bool) -> None:
    """Gives the Colab machine back, if that is `wanted`: everything outside of Google Drive goes with it."""
    if wanted and on_colab():
        from google.colab import runtime

        runtime.unassign()


def machine(folder: str | Path = ".") -> list[dict]:
    """Rows for a table: GPU, memory, disk, versions."""
    import torch

    gpu, vram = "none: CPU only", "-"
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_name()
        vram = "{:.1f} of {:.1f} GiB free".format(*(size / 2**30 for size in torch.cuda.mem_get_info()))
    rows = {
        "GPU": gpu,
        "GPU memory": vram,
        "host memory": f"{_host_gib():.1f} GiB",
        "processors": str(os.cpu_count()),
        "free disk": f"{shutil.disk_usage(folder).free / 2**30:.0f} GiB",
        "Python": platform.python_version(),
    }
    for package in ("torch", "diffusers", "transformers", "peft", "bitsandbytes"):
        rows[package] = _version(package)
    return [{"what": name, "here": value} for name, value in rows.items()]


def _host_gib() -> float:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return float("nan")
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
