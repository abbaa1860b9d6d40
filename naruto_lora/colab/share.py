"""What leaves this machine because somebody asked: a download in the browser, a LoRA on the hub."""

from __future__ import annotations

from pathlib import Path

from .. import lora
from .machine import on_colab

SHARED = (lora.FILE, "*.safetensors", "run.json", "README.md", "*.jpg")  # what of a run's folder goes to the hub


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
