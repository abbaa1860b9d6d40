"""Results that leave this machine on request: a download in the browser, a LoRA pushed to the hub."""

from __future__ import annotations

from pathlib import Path

from .. import lora
from .machine import on_colab

SHARED = (lora.FILE, "*.safetensors", "run.json", "README.md", "*.jpg")  # the files of a run that go to the hub


def download(file: str | Path, interactive: bool = True) -> None:
    """Downloads `file` in Colab's browser; elsewhere, or without a user, prints in which folder it is."""
    if on_colab() and interactive:
        from google.colab import files

        files.download(str(file))
    else:
        print(f"{Path(file).name} is in the folder '{Path(file).parent.name}'")


def push(folder: str | Path, repository: str) -> None:
    """Uploads a run's LoRA, record and model card to the hub as `repository`; '' does nothing.

    Raises PermissionError, which says what to do, without a token that has write access.
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
            f"the hub refuses to write '{repository}' ({type(error).__name__}): create a token with write access at "
            "https://huggingface.co/settings/tokens and save it in Colab's secrets as HF_TOKEN"
        ) from None
    print(f"https://huggingface.co/{repository}")
