"""This machine: on Colab or not, its GPU, memory, disk and versions; and how to give it back."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "diffusers", "transformers", "peft", "bitsandbytes")  # whose versions matter


def on_colab() -> bool:
    """Whether this is Colab's kernel (Kaggle sets COLAB variables too, but has no google.colab)."""
    try:
        return bool(os.environ.get("COLAB_RELEASE_TAG")) and importlib.util.find_spec("google.colab") is not None
    except ModuleNotFoundError:  # there is no google package at all
        return False


def end(wanted: bool) -> None:
    """Gives the Colab machine back if that is `wanted`; everything outside of Google Drive is lost then."""
    if wanted and on_colab():
        from google.colab import runtime

        runtime.unassign()


def rows(folder: str | Path = ".") -> list[dict]:
    """Table rows: GPU, memory, disk, versions."""
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
    for package in PACKAGES:
        rows[package] = installed(package) or "not installed"
    return [{"what": name, "here": value} for name, value in rows.items()]


def _host_gib() -> float:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return float("nan")
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


def installed(package: str) -> str | None:
    """The version of an installed package; None if it isn't installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
