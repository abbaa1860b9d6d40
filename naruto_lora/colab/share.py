"""Results that leave this machine on request: a download in the browser, a LoRA pushed to the hub."""

from __future__ import annotations

import json
import re
from pathlib import Path
from urllib.parse import quote

from .. import hub, lora
from ..show import report
from .machine import on_colab

LOCAL = {"dataset": "a local data set", "base": "a local base model", "vae": "a local VAE"}  # as the hub shows paths
PICTURES = (".jpg", ".jpeg", ".png", ".webp")
WRITE_ACCESS = (
    "create a token with write access at https://huggingface.co/settings/tokens and save it in Colab's secrets as "
    "HF_TOKEN"
)
REFUSED = (401, 403, 404)  # HTTP: no token, no write access, a private repository of somebody else


def download(file: str | Path, interactive: bool = True) -> None:
    """Downloads `file` in Colab's browser; elsewhere, or without a user, prints in which folder it is."""
    if on_colab() and interactive:
        from google.colab import files

        files.download(str(file))
    else:
        print(f"{Path(file).name} is in the folder '{Path(file).parent.name}'")


def push(folder: str | Path, repository: str, private: bool = True) -> None:
    """Uploads a run's LoRA, record and model card to the hub as `repository`, after it has listed them.

    An empty `repository` does nothing; a new one is private unless `private` is False. Raises PermissionError
    without a token that has write access, ConnectionError without the hub, ValueError for a wrong name.
    """
    if not repository:
        print("not pushed to the hub: `push_to` is empty")
        return
    from huggingface_hub import CommitOperationAdd, HfApi

    parts = shared(folder)
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=part) for name, part in parts.items()]
    api = HfApi()
    try:
        repository = api.create_repo(repository, private=private, exist_ok=True).repo_id  # with the user's name
        private = bool(api.model_info(repository).private)  # an older one stays as it is
        print(f"{len(parts)} files go to '{repository}' on the hub, which is {'private' if private else 'public'}:")
        for name, part in parts.items():
            print(f"  {name}, {_size(part) / 1e6:.2f} MB")
        api.create_commit(repo_id=repository, operations=operations, commit_message="A LoRA by naruto_lora")
    except Exception as error:  # the hub's client raises those of its HTTP library too
        raise _explained(error, repository) from None
    address = f"https://huggingface.co/{repository}"
    print(f"{address} is private: to publish it, choose 'Make public' at {address}/settings. Check README.md before: "
          "its prompts may be captions of your pictures." if private else address)


def refused(repository: str) -> str:
    """Why `push` to `repository` would fail, as far as can be seen before training; '' if nothing is wrong.

    Asks the hub who the token belongs to; without a network it says nothing.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.utils import validate_repo_id

    if not repository:
        return ""
    try:
        validate_repo_id(repository)
    except ValueError as error:
        return str(_explained(error, repository))
    if get_token() is None:
        return f"there is no token: {WRITE_ACCESS}"
    try:
        role = HfApi().whoami()["auth"]["accessToken"]["role"]
    except Exception as error:  # as in `push`; an unknown answer is no refusal
        status = getattr(getattr(error, "response", None), "status_code", None)
        return f"the hub doesn't know this token: {WRITE_ACCESS}" if status in REFUSED else ""
    return f"this token can only read: {WRITE_ACCESS}" if role == "read" else ""


def shared(folder: str | Path) -> dict[str, Path | bytes]:
    """{name on the hub: file or content} of the run in `folder`: all that `push` uploads.

    The two LoRA files, run.json without paths of this machine, and README.md with the pictures that it links.
    Raises FileNotFoundError without a LoRA.
    """
    folder = Path(folder)
    record = report.record_of(folder)
    if record is None or not (folder / lora.FILE).is_file():
        raise FileNotFoundError(f"there is no finished run in '{folder}': train first")
    names = [lora.FILE, report.lora_name(record)]
    card = folder / "README.md"
    if card.is_file():
        names += [card.name, *_linked(folder, card.read_text(encoding="utf-8", errors="replace"))]
    public = json.dumps(json.loads(json.dumps(record), object_hook=_without_paths), indent=1)
    return {name: folder / name for name in names if (folder / name).is_file()} | {"run.json": public.encode()}


def _linked(folder: Path, text: str) -> list[str]:
    """The pictures in `folder` that a card's text links; none of previews, checkpoints or hidden folders."""
    names = []
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        link = rf"""(?:[(<"'=]|url: )(?:\./)?(?:{re.escape(name)}|{re.escape(quote(name))})(?:[)>"'\s?#]|$)"""
        private = re.search(r"(^|/)\.|^previews/|^checkpoint-", name) or file.resolve() != folder.resolve() / name
        if file.suffix.lower() in PICTURES and not private and file.is_file() and re.search(link, text):
            names.append(name)
    return names


def _without_paths(fields: dict) -> dict:
    """A record's `fields` without folders of this machine: an absolute path becomes the file's name."""
    return {key: LOCAL[key] if key in LOCAL and value and not hub.is_repository(str(value))
            else Path(value).name if isinstance(value, str) and Path(value).is_absolute()
            else value for key, value in fields.items()}  # fmt: skip


def _size(part: Path | bytes) -> int:
    return len(part) if isinstance(part, bytes) else part.stat().st_size


def _explained(error: Exception, repository: str) -> Exception:
    """The exception to raise instead of the hub client's `error`: what is wrong, and how to fix it."""
    status, kind = getattr(getattr(error, "response", None), "status_code", None), type(error).__name__
    if status in REFUSED or kind == "LocalTokenNotFoundError":
        return PermissionError(f"the hub refuses to write '{repository}' ({kind}): {WRITE_ACCESS}")
    if kind == "HFValidationError":
        return ValueError(f"`push_to` can't be '{repository}': write it as your-name/my-style")
    if status is not None and status < 500:
        said = getattr(error, "server_message", None) or kind
        return ValueError(f"the hub doesn't take '{repository}' (HTTP {status}, {said}): change that and push again")
    reason = kind if status is None else f"HTTP {status}"
    return ConnectionError(f"'{repository}' can't be uploaded to the hub ({reason}): check the network and try again")
