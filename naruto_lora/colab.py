"""What the machine is: GPU, memory, disk; and where results are safe on Colab."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .files import writable


def on_colab() -> bool:
    """Whether this is Colab's kernel (Kaggle sets COLAB variables too, but has no google.colab)."""
    try:
        return bool(os.environ.get("COLAB_RELEASE_TAG")) and importlib.util.find_spec("google.colab") is not None
    except ModuleNotFoundError:  # not even a google package
        return False


def storage(folder: str, interactive: bool = True) -> Path:
    """The folder for results: on Colab, with somebody at the browser, under Google Drive; else as it is.

    Mounting Drive asks in a dialog, so `interactive` is False wherever nobody can answer. Absolute paths stay.
    Raises PermissionError if nothing can be written there.
    """
    path = Path(folder).expanduser()
    if on_colab() and interactive and not path.is_absolute():
        from google.colab import drive

        drive.mount("/content/drive")
        path = Path("/content/drive/MyDrive/naruto_lora") / path
    writable(path)
    return path.resolve()


def places(folder: str, interactive: bool = True) -> tuple[Path, Path | None]:
    """(where to train, the mirror that outlives this machine or None) for runs under `folder`.

    On Colab, with somebody at the browser, training works on the machine's own disk and the mirror is on Drive.
    Raises PermissionError if nothing can be written there.
    """
    kept = storage(folder, interactive)
    if not (on_colab() and interactive) or Path(folder).expanduser().is_absolute():
        return kept, None
    here = Path("/content") / folder
    writable(here)
    return here, kept


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
