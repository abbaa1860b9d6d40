"""Encoders turn pictures and texts into vectors that can be compared: a CLIP from the hub, or your own module."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's pixels (2103.00020)


@dataclass(frozen=True)
class Encoder:
    """`embed(pictures) -> (N, D)` of unit length; `fit(pictures, texts) -> (N,)`, how well each fits its text."""

    name: str
    embed: Callable[[list], np.ndarray]
    fit: Callable[[list, list[str]], np.ndarray]
    fit_means: str  # a description of `fit` for reports


def load(name: str) -> Encoder:
    """The encoder called `name`: a CLIP's hub id or folder, or the dotted name of a module with `embed` and `fit`.

    Raises ValueError for a module without them, OSError for a CLIP that can't be loaded.
    """
    if "/" in name or Path(name).is_dir():
        return _clip(name)
    try:
        if not re.fullmatch(r"\w+(\.\w+)*", name):
            raise ImportError
        module = importlib.import_module(name)
        return Encoder(name, module.embed, module.fit, module.FIT_MEANS)
    except (ImportError, AttributeError):
        raise ValueError(
            f"the encoder '{name}' must be a CLIP's hub id or folder, or a module with embed, fit and FIT_MEANS"
        ) from None


def _clip(name: str) -> Encoder:
    import torch
    from transformers import AutoTokenizer, CLIPModel

    from .. import models

    models.quiet()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model = CLIPModel.from_pretrained(name, dtype=torch.float32, use_safetensors=True).to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise OSError(
            f"the CLIP '{name}' can't be loaded ({str(error).splitlines()[0]}); it needs safetensors and a tokenizer"
        ) from None
    side, length = model.config.vision_config.image_size, model.config.text_config.max_position_embeddings

    @torch.no_grad()
    def embed(pictures: list) -> np.ndarray:
        parts = [_pixels(pictures[k : k + 32], side).to(device) for k in range(0, len(pictures), 32)]
        features = [model.visual_projection(model.vision_model(pixel_values=part).pooler_output) for part in parts]
        return torch.nn.functional.normalize(torch.cat(features), dim=1).cpu().numpy()

    @torch.no_grad()
    def fit(pictures: list, texts: list[str]) -> np.ndarray:
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt").to(device)
        words = model.text_projection(model.text_model(**tokens).pooler_output)
        words = torch.nn.functional.normalize(words, dim=1).cpu().numpy()
        return 100 * np.maximum((embed(pictures) * words).sum(1), 0)

    return Encoder(name, embed, fit, "CLIP score: 100 x cosine of picture and prompt, 0 at least (arXiv 2104.08718)")


def _pixels(pictures: list, side: int):
    """Pictures -> (N, 3, side, side), CLIP's input: a square from the centre, normalised by its mean and deviation."""
    import torch
    from PIL import Image, ImageOps

    fitted = [ImageOps.fit(p.convert("RGB"), (side, side), Image.Resampling.BICUBIC) for p in pictures]
    pixels = torch.from_numpy(np.stack([np.asarray(p) for p in fitted])).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
