"""What a recipe needs of the hub, brought onto this machine first: in a process of its own, watched for stalls."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from .progress import note

STALL = 90.0  # seconds without one byte more
PARTS = ("unet", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
DATA = (*PICTURES, ".parquet", ".arrow", ".md", ".csv", ".jsonl", ".txt", ".json", ".zip", ".tar")
LORA = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class Wanted:
    """Files of one repository that aren't on this machine yet."""

    repository: str
    kind: str  # model or dataset
    names: tuple[str, ...]
    size: int  # bytes

    def download(self, show=None) -> None:
        """Brings them here. A stalled download is ended and tried once more without Xet, in a fresh process.

        Raises FileNotFoundError for what is missing or gated, TimeoutError for a second stall.
        """
        for attempt in ("", "1"):
            error = _watched(self, show, os.environ | ({"HF_HUB_DISABLE_XET": attempt} if attempt else {}))
            if error is None:
                return
            if error != "stalled":
                raise FileNotFoundError(explain(self.repository, self.kind, error))
            note(show, f"the download of {self.repository} has stalled; it is tried again another way")
        raise TimeoutError(
            f"the download of '{self.repository}' stalls: check the network, then run this again; it goes on"
        )


def wanted(recipe) -> list[Wanted]:
    """What `recipe` needs of the hub and this machine doesn't have. Raises FileNotFoundError if the hub has none."""
    found = []
    if means_hub(recipe.base):
        found.append(_missing(recipe.base, "model", _of_base(_listing(recipe.base, "model"), recipe)))
    if means_hub(recipe.vae):
        found.append(_missing(recipe.vae, "model", _of_vae(_listing(recipe.vae, "model"), recipe)))
    if means_hub(recipe.dataset):
        found.append(_missing(recipe.dataset, "dataset", _of_data(_listing(recipe.dataset, "dataset"))))
    return [each for each in found if each]


def is_id(name: str) -> bool:
    """Whether `name` reads as a hub id, such as 'stabilityai/stable-diffusion-xl-base-1.0'."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None


def means_hub(name: str) -> bool:
    """Whether `name` means a repository on the hub: it reads as an id, and nothing of that name is here."""
    return is_id(name) and not Path(name).exists()


def _missing(repository: str, kind: str, sizes: dict[str, int]) -> Wanted | None:
    sizes = {name: size for name, size in sizes.items() if not _here(repository, kind, name)}
    return Wanted(repository, kind, tuple(sizes), sum(sizes.values())) if sizes else None


def fetch(recipe, show=None) -> None:
    """Downloads what is `wanted`. Raises what `wanted` and `Wanted.download` do."""
    for each in wanted(recipe):
        each.download(show)


def folder(repository: str, kind: str = "dataset") -> Path:
    """Where the files of a repository that was fetched are. Raises FileNotFoundError."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, repo_type=kind, local_files_only=True))
    except Exception as error:
        raise FileNotFoundError(explain(repository, kind, type(error).__name__)) from None


def data_set(repository: str) -> Path:
    """The folder of a data set on the hub; what isn't here of it is downloaded. Raises as `fetch`."""
    missing = _missing(repository, "dataset", _of_data(_listing(repository, "dataset")))
    if missing:
        missing.download()
    return folder(repository)


def adapter(repository: str) -> Path:
    """The folder of a LoRA on the hub, in diffusers' format. Raises FileNotFoundError."""
    sizes = {name: size for name, size in _listing(repository, "model").items() if name == LORA}
    if not sizes:
        raise FileNotFoundError(f"'{repository}' on the hub has no {LORA}: take another, or a file's path")
    if missing := _missing(repository, "model", sizes):
        missing.download()
    return folder(repository, "model")


def explain(repository: str, kind: str, error: str) -> str:
    """A sentence for one of the hub's errors, by its class's name."""
    place = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{repository}"
    what = f"the {'data set' if kind == 'dataset' else kind} '{repository}'"
    if "Gated" in error:
        return f"{what} is gated: accept its terms at {place}, then log in (on Colab: a secret named HF_TOKEN)"
    if "NotFound" in error and "Local" not in error:
        return f"{what} is neither a folder here nor on the hub ({place}): check the name; a private one needs HF_TOKEN"
    return f"{what} is neither a folder here nor to be had from the hub ({error}): check the name and the network"


def _listing(repository: str, kind: str) -> dict[str, int]:
    """{file name: bytes} on the hub; of what is here (sizes 0: nothing is to come) where the hub can't be asked."""
    from huggingface_hub import HfApi

    try:
        about = HfApi().repo_info(repository, repo_type=kind, files_metadata=True, timeout=20)
        return {file.rfilename: file.size or 0 for file in about.siblings}
    except Exception as error:
        if "Repo" in type(error).__name__:
            raise FileNotFoundError(explain(repository, kind, type(error).__name__)) from None
        here = folder(repository, kind)
        return {file.relative_to(here).as_posix(): 0 for file in here.rglob("*") if file.is_file()}


def _here(repository: str, kind: str, name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repository, name, repo_type=kind), str)


def _of_base(listing: dict[str, int], recipe) -> dict[str, int]:
    """The files that `models` will load: per part its settings, and weights in fp16 where that is the precision."""
    parts = PARTS if recipe.vae else (*PARTS, "vae")
    found = {name: size for name, size in listing.items() if name == "model_index.json"}
    for part in parts:
        inside = {name: size for name, size in listing.items() if os.path.dirname(name) == part}
        found |= {name: size for name, size in inside.items() if name.endswith((".json", ".txt"))}
        found |= _weights(inside, recipe.precision)
    return found


def _of_vae(listing: dict[str, int], recipe) -> dict[str, int]:
    top = {name: size for name, size in listing.items() if "/" not in name}
    return {name: size for name, size in top.items() if name == "config.json"} | _weights(top, recipe.precision)


def _weights(listing: dict[str, int], precision: str) -> dict[str, int]:
    names = ("diffusion_pytorch_model", "model")
    weights = {n: s for n, s in listing.items() if n.endswith(".safetensors") and os.path.basename(n).startswith(names)}
    half = {name: size for name, size in weights.items() if ".fp16." in name}
    whole = {name: size for name, size in weights.items() if os.path.basename(name).count(".") == 1}
    return half if half and precision == "fp16" else whole


def _of_data(listing: dict[str, int]) -> dict[str, int]:
    return {name: size for name, size in listing.items() if name.lower().endswith(DATA)}


def _watched(wanted: Wanted, show, environment: dict) -> str | None:
    """Downloads in a process of its own: None when all is here, 'stalled', or the error's class."""
    package = str(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, (package, environment.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "naruto_lora.hub", wanted.kind, wanted.repository, *wanted.names]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, env=environment | {"PYTHONPATH": path})
        try:
            if not _ends(process, wanted, show):
                return "stalled"
        finally:
            process.kill()
            process.wait()
        said.seek(0)
        return None if process.returncode == 0 else said.read().strip().splitlines()[-1:][0]


def _ends(process: subprocess.Popen, wanted: Wanted, show) -> bool:
    """Shows how far the download is until `process` ends; False if STALL seconds pass without one byte more."""
    places, total = _places(wanted), max(1, wanted.size >> 20)
    changed, before = time.monotonic(), _bytes(places)
    most = before
    while process.poll() is None:
        time.sleep(0.3)
        now = _bytes(places)
        if now > most:
            most, changed = now, time.monotonic()
            if show:
                show("download", min(now - before, wanted.size) >> 20, total)
        if time.monotonic() - changed > STALL:
            return False
    if process.returncode == 0 and show:
        show("download", total, total)
    return True


def _places(wanted: Wanted) -> list[Path]:
    """Where a download shows that it moves: the repository's own folder, and Xet's."""
    from huggingface_hub import constants

    own = f"{wanted.kind}s--{wanted.repository.replace('/', '--')}"
    return [Path(constants.HF_HUB_CACHE, own), Path(constants.HF_XET_CACHE)]


def _bytes(places: list[Path]) -> int:
    total = 0
    for file in (file for place in places for file in place.rglob("*")):
        try:
            total += 0 if file.is_symlink() or not file.is_file() else file.stat().st_size
        except OSError:  # gone meanwhile
            continue
    return total


def main(arguments: list[str]) -> int:
    """`python -m naruto_lora.hub KIND REPOSITORY NAME...` downloads; the last line of a failure is its class."""
    from huggingface_hub import snapshot_download

    kind, repository, *names = arguments
    try:
        print(json.dumps(snapshot_download(repository, repo_type=kind, allow_patterns=names)))
    except Exception as error:
        print(error, type(error).__name__, sep="\n", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
