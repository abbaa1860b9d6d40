"""Downloads what a recipe needs from the Hugging Face hub, in a separate process that is watched for stalls."""

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

STALL = 90.0  # seconds without a new byte
PARTS = ("unet", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
PICTURES = (
    ".png", ".jpg", ".jpeg", ".jfif", ".jpe", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".avif", ".heic",
    ".heif", ".jp2", ".mpo", ".tga", ".ico", ".apng", ".ppm", ".pgm", ".pbm", ".pnm",
)  # fmt: skip
DATA = (*PICTURES, ".parquet", ".arrow", ".md", ".csv", ".jsonl", ".txt", ".caption", ".json", ".zip", ".tar")
LORA = "pytorch_lora_weights.safetensors"  # diffusers' own name
PEFT = ("adapter_model.safetensors", "adapter_config.json")  # peft's: weights, settings


@dataclass(frozen=True)
class Download:
    """Files of one repository that are not on this machine yet."""

    repository: str
    kind: str  # model or dataset
    names: tuple[str, ...]
    size: int  # bytes

    def run(self, show=None) -> None:
        """Downloads the files. After a stall it tries once more, without Xet, in a new process.

        Raises FileNotFoundError for a repository that is missing or gated, TimeoutError for a second stall.
        """
        for settings in ({}, {"HF_HUB_DISABLE_XET": "1"}):
            if settings:
                note(show, f"the download of {self.repository} has stalled; trying again without Xet")
            error = _run_watched(self, show, os.environ | settings)
            if error is None:
                return
            if error != "stalled":
                raise FileNotFoundError(explain(self.repository, self.kind, error))
        raise TimeoutError(
            f"the download of '{self.repository}' stalls: check the network, then run this again to continue it"
        )


def missing(recipe) -> list[Download]:
    """The downloads that `recipe` still needs. Raises FileNotFoundError for a repository that is not on the hub."""
    downloads = []
    if is_repository(recipe.base):
        downloads.append(_download(recipe.base, "model", _base_files(_listing(recipe.base, "model"), recipe)))
    if is_repository(recipe.vae):
        downloads.append(_download(recipe.vae, "model", _vae_files(_listing(recipe.vae, "model"), recipe)))
    if is_repository(recipe.dataset):
        downloads.append(_download(recipe.dataset, "dataset", _data_files(_listing(recipe.dataset, "dataset"))))
    return [download for download in downloads if download]


def is_id(name: str) -> bool:
    """Whether `name` looks like a hub id, such as 'stabilityai/stable-diffusion-xl-base-1.0'."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None


def is_repository(name: str) -> bool:
    """Whether `name` means a repository on the hub: it looks like an id, and no file or folder has this name."""
    return is_id(name) and not Path(name).exists()


def _download(repository: str, kind: str, sizes: dict[str, int]) -> Download | None:
    """The download of those files, of {name: bytes}, that are not on this machine; None if all are."""
    sizes = {name: size for name, size in sizes.items() if not _is_here(repository, kind, name)}
    return Download(repository, kind, tuple(sizes), sum(sizes.values())) if sizes else None


def fetch(recipe, show=None) -> None:
    """Downloads what is `missing`. Raises what `missing` and `Download.run` raise."""
    for download in missing(recipe):
        download.run(show)


def folder(repository: str, kind: str = "dataset") -> Path:
    """The local folder of a downloaded repository. Raises FileNotFoundError."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, repo_type=kind, local_files_only=True))
    except Exception as error:
        raise FileNotFoundError(explain(repository, kind, type(error).__name__)) from None


def data_set(repository: str) -> Path:
    """The local folder of a data set on the hub; downloads missing files first. Raises what `fetch` raises."""
    if download := _download(repository, "dataset", _data_files(_listing(repository, "dataset"))):
        download.run()
    return folder(repository)


def adapter(repository: str) -> Path:
    """The local file of a LoRA on the hub: diffusers', peft's, or its only .safetensors file; downloads it first.

    Raises FileNotFoundError if it has none or several of other names, and what `fetch` raises.
    """
    listing = _listing(repository, "model")
    found = sorted(name for name in listing if name.endswith(".safetensors"))
    name = next((name for name in (LORA, PEFT[0]) if name in found), found[0] if len(found) == 1 else None)
    if name is None:
        several = f"several .safetensors files ({', '.join(found[:4])})" if found else "no .safetensors file"
        raise FileNotFoundError(f"'{repository}' on the hub has {several}: choose another, or download one and name it")
    names = (name, PEFT[1]) if name == PEFT[0] else (name,)
    if download := _download(repository, "model", {name: listing[name] for name in names if name in listing}):
        download.run()
    return Path(str(_cached(repository, "model", name)))


def explain(repository: str, kind: str, error: str) -> str:
    """What is wrong and how to fix it; `error` is the name of the client's error class, perhaps with HTTP's status."""
    place = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{repository}"
    what = f"the {'data set' if kind == 'dataset' else kind} '{repository}'"
    if "Gated" in error:
        return f"{what} is gated: accept its terms at {place}, then log in (on Colab: a secret named HF_TOKEN)"
    if "NotFound" in error and "Local" not in error:
        return f"{what} is neither a folder here nor on the hub ({place}): check the name; a private one needs HF_TOKEN"
    if error.endswith((" 401", " 403")):
        return f"the hub refuses {what}: log in with a token that may read it (on Colab: a secret named HF_TOKEN)"
    error = error if is_id(repository) else "it is no hub id such as 'owner/name'"
    return f"{what} is no folder here, and can't be downloaded from the hub ({error}): check the name and the network"


def _listing(repository: str, kind: str) -> dict[str, int]:
    """{file name: bytes} on the hub. Without a network: the files on this machine, with size 0."""
    from huggingface_hub import HfApi

    try:
        about = HfApi().repo_info(repository, repo_type=kind, files_metadata=True, timeout=20)
        return {file.rfilename: file.size or 0 for file in about.siblings}
    except Exception as error:
        if "Repo" in type(error).__name__:
            raise FileNotFoundError(explain(repository, kind, type(error).__name__)) from None
        here = folder(repository, kind)
        return {file.relative_to(here).as_posix(): 0 for file in here.rglob("*") if file.is_file()}


def _cached(repository: str, kind: str, name: str) -> str | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, name, repo_type=kind)  # a mark instead of a path: not on the hub
    return found if isinstance(found, str) else None


def _is_here(repository: str, kind: str, name: str) -> bool:
    return _cached(repository, kind, name) is not None


def _base_files(listing: dict[str, int], recipe) -> dict[str, int]:
    """The files that `models` loads: each part's settings and weights, fp16 weights for a recipe in fp16."""
    parts = PARTS if recipe.vae else (*PARTS, "vae")
    found = {name: size for name, size in listing.items() if name == "model_index.json"}
    for part in parts:
        inside = {name: size for name, size in listing.items() if os.path.dirname(name) == part}
        found |= {name: size for name, size in inside.items() if name.endswith((".json", ".txt"))}
        found |= _weights(inside, recipe.precision)
    return found


def _vae_files(listing: dict[str, int], recipe) -> dict[str, int]:
    top = {name: size for name, size in listing.items() if "/" not in name}
    return {name: size for name, size in top.items() if name == "config.json"} | _weights(top, recipe.precision)


def _weights(listing: dict[str, int], precision: str) -> dict[str, int]:
    names = ("diffusion_pytorch_model", "model")
    weights = {n: s for n, s in listing.items() if n.endswith(".safetensors") and os.path.basename(n).startswith(names)}
    half = {name: size for name, size in weights.items() if ".fp16." in name}
    whole = {name: size for name, size in weights.items() if os.path.basename(name).count(".") == 1}
    return half if half and precision == "fp16" else whole


def _data_files(listing: dict[str, int]) -> dict[str, int]:
    return {name: size for name, size in listing.items() if name.lower().endswith(DATA)}


def _run_watched(download: Download, show, environment: dict) -> str | None:
    """Downloads in a new process. Returns None for success, 'stalled', or the name of the error's class."""
    package = str(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, (package, environment.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "naruto_lora.hub", download.kind, download.repository, *download.names]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment | {"PYTHONPATH": path})
        try:
            if not _wait(process, download, show):
                return "stalled"
        finally:
            process.kill()
            process.wait()
        output.seek(0)
        return None if process.returncode == 0 else output.read().strip().splitlines()[-1:][0]


def _wait(process: subprocess.Popen, download: Download, show) -> bool:
    """Shows the progress until `process` ends; False if STALL seconds pass without a new byte."""
    folders, total = _folders(download), max(1, download.size >> 20)
    changed, before = time.monotonic(), _bytes(folders)
    most = before
    while process.poll() is None:
        time.sleep(0.3)
        now = _bytes(folders)
        if now > most:
            most, changed = now, time.monotonic()
            if show:
                show("download", min(now - before, download.size) >> 20, total)
        if time.monotonic() - changed > STALL:
            return False
    if process.returncode == 0 and show:
        show("download", total, total)
    return True


def _folders(download: Download) -> list[Path]:
    """The folders that grow during a download: the repository's own, and Xet's."""
    from huggingface_hub import constants

    own = f"{download.kind}s--{download.repository.replace('/', '--')}"
    return [Path(constants.HF_HUB_CACHE, own), Path(constants.HF_XET_CACHE)]


def _bytes(folders: list[Path]) -> int:
    total = 0
    for file in (file for folder in folders for file in folder.rglob("*")):
        try:
            total += 0 if file.is_symlink() or not file.is_file() else file.stat().st_size
        except OSError:  # deleted in the meantime
            continue
    return total


def main(arguments: list[str]) -> int:
    """`python -m naruto_lora.hub KIND REPOSITORY NAME...` downloads; a failure's last line is its class and status."""
    from huggingface_hub import snapshot_download

    kind, repository, *names = arguments
    try:
        print(json.dumps(snapshot_download(repository, repo_type=kind, allow_patterns=names)))
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", "")
        print(error, f"{type(error).__name__} {status}".strip(), sep="\n", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
