"""The parts of SDXL, loaded one at a time, straight to their device and dtype."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import warnings
from pathlib import Path

import torch

from . import hub

DTYPES = {"fp16": torch.float16, "fp32": torch.float32}


def device_for(precision: str) -> torch.device:
    """The device for a recipe's precision. Raises RuntimeError for fp16 without a GPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if precision == "fp16":
        raise RuntimeError(
            "this recipe trains in fp16, which needs a CUDA GPU, and none is here; on Colab choose Runtime > "
            "Change runtime type > T4 GPU, elsewhere use the embedded default (bash colab_setup.sh run)"
        )
    return torch.device("cpu")


def check_base(base: str, vae: str = "") -> None:
    """Raises ValueError unless `base` is an SDXL base model with epsilon prediction in diffusers' layout.

    Raises FileNotFoundError if `base`, or a `vae` that is not '', is neither a folder nor on the hub.
    """
    quiet()
    index = _config(base, "model_index.json", "a diffusers model")
    kind = index.get("_class_name", "an unnamed pipeline")
    if kind != "StableDiffusionXLPipeline":
        raise ValueError(f"the base '{base}' is a {kind}, not a StableDiffusionXLPipeline; choose an SDXL base model")
    if unet_config(base).get("addition_embed_type") != "text_time":
        raise ValueError(f"the U-Net of '{base}' has no size conditioning, so it is not SDXL Base; choose an SDXL base")
    kind = _config(base, "scheduler/scheduler_config.json", "an SDXL model").get("prediction_type", "epsilon")
    if kind != "epsilon":
        raise ValueError(f"the base '{base}' predicts '{kind}'; only epsilon prediction (SDXL Base's) is supported")
    if vae:
        _config(vae, "config.json", "a VAE")


def vae_scale_factor(base: str, vae: str = "") -> int:
    """How many px of a picture's side one latent pixel covers: 8 for SDXL (diffusers' name)."""
    config = _config(vae, "config.json", "a VAE") if vae else _config(base, "vae/config.json", "an SDXL model")
    return 2 ** (len(config["block_out_channels"]) - 1)


def unet_config(base: str) -> dict:
    """The configuration of the base's U-Net. Raises ValueError or FileNotFoundError if there is none."""
    return _config(base, "unet/config.json", "an SDXL model")


def prompt_shapes(base: str) -> dict[str, tuple[int, ...]]:
    """The shapes of an encoded prompt: prompt_embeds (L, D) and pooled (P,); 77 x 2048 and 1280 for SDXL."""
    tokenizer, unet = _config(base, "tokenizer/tokenizer_config.json", "an SDXL model"), unet_config(base)
    pooled = unet["projection_class_embeddings_input_dim"] - 6 * unet["addition_time_embed_dim"]  # less six time_ids
    return {"prompt_embeds": (tokenizer.get("model_max_length", 77), unet["cross_attention_dim"]), "pooled": (pooled,)}


def default_resolution(base: str, vae: str = "") -> int:
    """The side of the pictures that the base was trained for, in px: 1024 for SDXL."""
    return unet_config(base).get("sample_size", 128) * vae_scale_factor(base, vae)


def identity(source: str) -> str:
    """Identifies a model: its hub id, or a hash of a folder's weights (sizes and first MiB; not the folder's path)."""
    files, digest = sorted(Path(source).rglob("*.safetensors")), hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}:{file.stat().st_size}".encode())
        with open(file, "rb") as handle:
            digest.update(handle.read(2**20))
    return digest.hexdigest() if files else source


def _config(base: str, name: str, what: str) -> dict:
    folder = Path(base).expanduser()
    file = folder / name if folder.is_dir() else Path(_download(base, name))
    if not file.is_file():
        raise ValueError(f"the folder '{base}' is not {what}: it has no {name}; choose another")
    return json.loads(file.read_text(encoding="utf-8"))


def _download(base: str, name: str) -> str:
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(base, name)
    except Exception as error:  # the hub's client raises many kinds; a user needs one sentence
        kind = type(error).__name__
        if kind.endswith("EntryNotFoundError") and "Local" not in kind:
            raise FileNotFoundError(f"the model '{base}' on the hub has no {name}: choose another") from None
        raise FileNotFoundError(hub.explain(base, "model", kind)) from None


def _variant(base: str, part: str, dtype: torch.dtype) -> str | None:
    """'fp16' if `dtype` is fp16 and `base` has files of this variant for `part`."""
    if dtype != torch.float16:
        return None
    names = _files(Path(base)) if Path(base).is_dir() else _hub_files(base)
    found = [name for name in names if name.endswith(".fp16.safetensors") and name.rpartition("/")[0] == part]
    return "fp16" if found else None


def _files(folder: Path) -> list[str]:
    return [file.relative_to(folder).as_posix() for file in folder.rglob("*.safetensors")]


@functools.cache
def _hub_files(base: str) -> list[str]:
    """The names of a hub model's files; without a network, of those on this machine."""
    from huggingface_hub import HfApi

    try:
        return HfApi().list_repo_files(base)
    except Exception:  # no network, or HF_HUB_OFFLINE
        return _files(Path(_download(base, "model_index.json")).parent)


def quiet() -> None:
    """Hides the libraries' progress bars and harmless warnings; errors still show."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import diffusers
    import transformers

    warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are intended
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def _load(kind, base: str, part: str, dtype: torch.dtype, device):
    dtype_name = "dtype" if part.startswith("text_encoder") else "torch_dtype"  # transformers 5 and diffusers differ
    options = {dtype_name: dtype, "variant": _variant(base, part, dtype), "use_safetensors": True}
    model = kind.from_pretrained(base, subfolder=part or None, **options)
    return model.to(device).eval().requires_grad_(False)


def load_text_encoders(base: str, dtype: torch.dtype, device):
    """[(tokenizer, text encoder), (tokenizer_2, text encoder with projection)], in eval mode.

    Their files are memory-mapped until the weights are on the device: 6 MiB of host memory for the second's 1.3 GiB.
    """
    quiet()
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    kinds = {"": CLIPTextModel, "_2": CLIPTextModelWithProjection}
    tokenizers = [CLIPTokenizer.from_pretrained(base, subfolder=f"tokenizer{n}") for n in kinds]
    encoders = [_load(kind, base, f"text_encoder{n}", dtype, device) for n, kind in kinds.items()]
    return list(zip(tokenizers, encoders, strict=True))


def load_vae(base: str, vae: str, dtype: torch.dtype, device):
    """The VAE at `vae` (hub id or folder), or the base's own if `vae` is ''.

    A VAE that overflows in fp16 (its config says `force_upcast`, as SDXL's own does) is loaded in fp32.
    """
    quiet()
    from diffusers import AutoencoderKL

    source, part = (vae, "") if vae else (base, "vae")
    config = AutoencoderKL.load_config(source, subfolder=part or None)
    if config.get("force_upcast", True):
        dtype = torch.float32
    return _load(AutoencoderKL, source, part, dtype, device)


def load_unet(base: str, dtype: torch.dtype, device):
    """The U-Net, frozen, in eval mode (it has no dropout, so this changes nothing).

    A single file is read in portions: 1.4 GiB of host memory for SDXL's U-Net; from_pretrained maps the whole file,
    5.8 GiB (measured on an H200).
    """
    quiet()
    from diffusers import UNet2DConditionModel

    file = _one_file(base, dtype)
    if file is None:
        return _load(UNet2DConditionModel, base, "unet", dtype, device)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(base, subfolder="unet"))
    unet.load_state_dict(_read(file, dtype, device), assign=True)
    return unet.eval().requires_grad_(False)


def _one_file(base: str, dtype: torch.dtype) -> Path | None:
    """The file of the whole U-Net; None if it is split over several."""
    dot_variant = ".fp16" if _variant(base, "unet", dtype) else ""
    name = f"unet/diffusion_pytorch_model{dot_variant}.safetensors"
    if Path(base).is_dir():
        return Path(base, name) if Path(base, name).is_file() else None
    return Path(_download(base, name)) if name in _hub_files(base) else None


def _read(file: Path, dtype: torch.dtype, device, portion: int = 100) -> dict[str, torch.Tensor]:
    """A file's tensors on `device`. Reopening it after each `portion` of tensors frees the mapped pages."""
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        names = list(opened.keys())
    tensors = {}
    for start in range(0, len(names), portion):
        with safe_open(file, "pt") as opened:
            for name in names[start : start + portion]:
                tensors[name] = opened.get_tensor(name).to(device, dtype)
    return tensors


def load_alphas_cumprod(base: str) -> torch.Tensor:
    """The base's noise schedule: cumulative alphas (1000,), fp32, on the CPU (in fp16 the first are up to 7% off)."""
    quiet()
    from diffusers import DDPMScheduler

    return DDPMScheduler.from_pretrained(base, subfolder="scheduler").alphas_cumprod
