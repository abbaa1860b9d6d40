"""What a run needs and what this machine has, checked before anything long begins."""

from __future__ import annotations

import platform
import re
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from .. import hub, models, pipeline
from ..memory import gpu, plan, predict
from . import share
from .machine import PACKAGES, installed

GPU_MENU = "on Colab: Runtime › Change runtime type › T4 GPU, then run all cells again"
HOST = 1.5 * gpu.GIB  # for Python and torch themselves (measured on an H200)


@dataclass(frozen=True)
class Row:
    """One requirement: what is here, what is needed, and what to do if that is too little."""

    what: str
    here: str
    needed: str = ""
    short: str = ""
    stops: bool = False  # nothing below can work without it

    def as_dict(self) -> dict[str, str]:
        verdict = "yes" if self.needed else ""
        if self.short:
            verdict = f"{'NO' if self.stops else 'warning'}: {self.short}"
        return {"": self.what, "here": self.here, "needed": self.needed, "enough?": verdict}


def check(recipe, folder: str | Path = ".", card: gpu.Card | None = None, push_to: str = "") -> list[Row]:
    """Checks GPU, its memory, host memory, disk, versions and the hub to push to; `card` is by default the one here."""
    import torch

    if card is None:
        gpu.free()
        card = gpu.Card.here(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    rows = [_gpu(recipe, card)]
    if card.cuda or recipe.precision == "fp32":
        rows += [_training(recipe, card), _drawing(recipe, card)]
    return [*rows, _host(recipe), *_disk(recipe, Path(folder)), *_versions(), *_push(push_to)]


def refuse(rows: list[Row]) -> None:
    """Raises RuntimeError, which says what to do, if `check` found something that stops everything."""
    stopping = [f"{row.what}: {row.here}, needed: {row.needed}; {row.short}" for row in rows if row.short and row.stops]
    if stopping:
        raise RuntimeError(". ".join(stopping))


def _gpu(recipe, card: gpu.Card) -> Row:
    needed = "CUDA, for fp16" if recipe.precision == "fp16" else "none (fp32)"
    lacking = recipe.precision == "fp16" and not card.cuda
    return Row("GPU", card.name if card.cuda else "none: CPU only", needed, GPU_MENU if lacking else "", lacking)


def _training(recipe, card: gpu.Card) -> Row:
    what, here = "memory to train", f"{card.free / gpu.GIB:.1f} GiB free"
    try:
        row = plan.plan(recipe, card, recipe.steps).chosen
    except RuntimeError as error:
        return Row(what, here, "more GPU memory", str(error))
    return Row(what, here, f"{row.parts.reserved / gpu.GIB:.1f} GiB: {row.what}")


def _drawing(recipe, card: gpu.Card) -> Row:
    size = 2 if recipe.precision == "fp16" else 4
    side = models.default_resolution(recipe.base, recipe.vae)
    needed = _weights(recipe) + size * side**2 * pipeline.VAE_VALUES  # one picture in the VAE's decoder
    short = "lower `resolution`, or close other programs that use the GPU" if needed > card.free else ""
    return Row("memory to draw", f"{card.free / gpu.GIB:.1f} GiB free", f"{needed / gpu.GIB:.1f} GiB", short)


def _weights(recipe) -> float:
    """Bytes of the whole pipeline, estimated from the U-Net's: SDXL's other parts are a third of those."""
    size = 2 if recipe.precision == "fp16" else 4
    return 4 / 3 * size * predict.shape_of(recipe).numbers


def _host(recipe) -> Row:
    here = gpu.host_free()
    needed = HOST + _weights(recipe) / 4  # of the largest file that is mapped whole: the second text encoder's
    short = "the kernel may be killed (exit 138): restart it and close other notebooks" if here < needed else ""
    return Row("host memory", f"{here / gpu.GIB:.1f} GiB free", f"{needed / gpu.GIB:.1f} GiB", short)


def _disk(recipe, folder: Path) -> list[Row]:
    """A row for the disk of downloads, and one for the disk of runs if that is a different one."""
    from huggingface_hub import constants

    download = 1.05 * sum(missing.size for missing in hub.missing(recipe))
    run = runs_bytes(recipe)
    places = {"disk for downloads": (_existing(Path(constants.HF_HUB_CACHE)), download),
              "disk for runs": (_existing(folder), run)}
    if len({place.stat().st_dev for place, _ in places.values()}) == 1:
        places = {"disk": (_existing(folder), download + run)}
    return [_disk_row(what, place, needed) for what, (place, needed) in places.items()]


def _disk_row(what: str, place: Path, needed: float) -> Row:
    free = shutil.disk_usage(place).free
    short = "make room: empty the trash, or delete old runs or models" if free < needed else ""
    return Row(what, f"{free / 1e9:.1f} GB free", f"{needed / 1e9:.1f} GB", short, bool(short))


def runs_bytes(recipe) -> float:
    """About the bytes of a run's folder and cache: five checkpoints of LoRA and optimizer, 2,000 encoded pictures."""
    adapter = sum(predict.shape_of(recipe).sides) * recipe.rank * 4
    latents = 2000 * (2 if recipe.flip else 1) * 2 * 2 * 4 * (recipe.resolution / 8) ** 2
    return 5 * 3 * adapter + latents


def _existing(folder: Path) -> Path:
    """`folder`, or the nearest folder above it that exists."""
    folder = folder.expanduser().absolute()
    return next(place for place in (folder, *folder.parents) if place.exists())


def _versions() -> list[Row]:
    least = floors()
    rows = [Row("Python", platform.python_version(), "3.11")]
    for name in PACKAGES:
        here, needed = installed(name), least.get(name, "")
        short = ""
        if here is None and name != "bitsandbytes":
            short = "`bash colab_setup.sh run` installs it"
        elif here is not None and needed and _numbers(here) < _numbers(needed):
            short = "choose Colab's newest runtime version, or install a newer one"
        rows.append(Row(name, here or "not installed", needed, short))
    return rows


def _push(push_to: str) -> list[Row]:
    if not push_to:
        return []
    short = share.refused(push_to)
    return [Row("`push_to`", push_to, "a name and a token", short, bool(short))]


def floors() -> dict[str, str]:
    """{package: the lowest supported version}, from the checkout's requirements.txt or the installed package."""
    file = Path(__file__).parents[2] / "requirements.txt"
    try:
        lines = file.read_text().splitlines() if file.is_file() else requires("naruto_lora") or []
    except PackageNotFoundError:
        return {}
    return {found[1]: found[2] for line in lines if (found := re.match(r"([\w-]+)>=([\w.]+)", line))}


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text.split("+")[0])[:3]]
