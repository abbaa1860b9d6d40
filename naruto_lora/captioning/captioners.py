"""Captioners turn pictures into captions: BLIP, Florence-2, a WD tagger, or your own module."""

from __future__ import annotations

import csv
import importlib
import json
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

NAMES = {
    "blip": "Salesforce/blip-image-captioning-large",  # as the naruto data set was captioned
    "florence-2": "florence-community/Florence-2-base",  # Microsoft's weights in the layout that transformers reads
    "wd": "SmilingWolf/wd-vit-tagger-v3",
}
FILES = ("config.json", "model.safetensors", "*.json", "*.txt", "selected_tags.csv")  # of a model, on the hub
SIZE = 19 * 10**8  # bytes: the largest of NAMES, for the progress of a download
LARGEST = 1024  # px: pictures are reduced to this side before a captioner gets them
LENGTH = 60  # tokens of a caption at most; SDXL reads 75
TAG, CHARACTER = 0.35, 0.75  # probabilities from which a tag, or a character's name, counts (as in SmilingWolf's own)
TASK = "Describe in detail what is shown in the image."  # Florence-2's <DETAILED_CAPTION>
CLIP = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])  # mean, deviation
DECODING = {"num_beams": 3, "do_sample": False, "max_new_tokens": LENGTH}
ARAFED = re.compile(r"\bara(?:fe?d|ffe?d?)\b ?")  # no word, but BLIP often says it
Describe = Callable[[list[Image.Image]], list[str]]


@dataclass(frozen=True)
class Captioner:
    """`describe(pictures) -> captions`, at most `batch` pictures of any size in RGB at a time."""

    name: str
    describe: Describe
    batch: int = 8


def load(name: str, show=None) -> Captioner:
    """The captioner `name`: one of NAMES, a hub id or folder of such a model, or the dotted name of a module.

    A module has `describe(pictures) -> captions`. Models run in fp16 on a GPU, else in fp32; decoding is by beams, so
    that a picture always gets the same caption. Raises ValueError for what is none of these, FileNotFoundError or
    OSError for a model that can't be downloaded or loaded, with one sentence.
    """
    source = NAMES.get(name, name)
    if "/" not in source and not Path(source).expanduser().is_dir():
        return _module(name)
    folder = _folder(source, show)
    config = _json(folder, "config.json")
    kind = config.get("model_type") or ("timm" if "architecture" in config else "model without a type")
    if kind not in LOADERS:
        raise ValueError(f"the captioner '{name}' is a '{kind}', not BLIP, Florence-2 or a timm tagger; choose another")
    try:
        describe = LOADERS[kind](folder, config)
    except (OSError, RuntimeError, KeyError) as error:
        reason = textwrap.shorten(str(error), 100, placeholder=" ...")
        raise OSError(f"the captioner '{name}' can't be loaded ({reason}); check its files") from None
    return Captioner(name, describe)


def _module(name: str) -> Captioner:
    try:
        if not re.fullmatch(r"\w+(\.\w+)*", name):
            raise ImportError
        return Captioner(name, importlib.import_module(name).describe, 32)
    except (ImportError, AttributeError):
        known = ", ".join(NAMES)
        raise ValueError(f"no captioner is called '{name}'; choose {known}, a hub id, a folder or a module with "
                         "`describe`") from None  # fmt: skip


def _folder(source: str, show) -> Path:
    """A model's folder, or that of its hub repository, which is downloaded first. Raises FileNotFoundError."""
    from .. import hub

    if Path(source).expanduser().is_dir():
        return Path(source).expanduser()
    try:
        folder = hub.folder(source, "model")
    except FileNotFoundError:
        folder = None
    if folder is None or not all((folder / name).is_file() for name in FILES[:2]):
        hub.Download(source, "model", FILES, SIZE).run(show)
        folder = hub.folder(source, "model")
    return folder


def _json(folder: Path, name: str) -> dict:
    try:
        return json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"'{folder}' is no captioner: it has no {name}; choose another") from None


def _device():
    """(device, dtype) for a captioner."""
    import torch

    cuda = torch.cuda.is_available()
    return torch.device("cuda" if cuda else "cpu"), torch.float16 if cuda else torch.float32


def _weights(kind, folder: Path):
    """A transformers model whose weights are all in its safetensors. Raises ValueError if some are not."""
    from .. import models

    models.quiet()
    device, dtype = _device()
    model, about = kind.from_pretrained(folder, dtype=dtype, use_safetensors=True, output_loading_info=True)
    lacking = sorted(about["missing_keys"])
    if lacking:
        raise ValueError(
            f"the captioner in '{folder}' has not the layout of {kind.__name__}: {len(lacking)} weights such as "
            f"{lacking[0]} are missing; choose {' or '.join(list(NAMES)[:2])}"
        )
    return model.to(device).eval().requires_grad_(False)


def _pixels(pictures: list[Image.Image], side: int, about: dict, like):
    """(N, 3, side, side), normalised as a model's preprocessor_config.json says, on `like`'s device and dtype."""
    import torch

    way = Image.Resampling(about.get("resample", Image.Resampling.BICUBIC))
    stack = np.stack([np.asarray(picture.convert("RGB").resize((side, side), way)) for picture in pictures])
    mean, std = (torch.tensor(about.get(key, known)).view(3, 1, 1) for key, known in
                 zip(("image_mean", "image_std"), CLIP, strict=True))  # fmt: skip
    pixels = (torch.from_numpy(stack).permute(0, 3, 1, 2).float() / 255 - mean) / std
    return pixels.to(like.device, like.dtype)


def _blip(folder: Path, config: dict) -> Describe:
    import torch
    from transformers import BertTokenizerFast, BlipForConditionalGeneration

    model = _weights(BlipForConditionalGeneration, folder)
    tokenizer = BertTokenizerFast.from_pretrained(folder)
    about, side = _json(folder, "preprocessor_config.json"), model.config.vision_config.image_size

    @torch.no_grad()
    def describe(pictures: list[Image.Image]) -> list[str]:
        pixels = _pixels(pictures, side, about, model)
        tokens = model.generate(pixel_values=pixels, min_new_tokens=5, **DECODING)
        return [ARAFED.sub("", text).strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    return describe


def _florence(folder: Path, config: dict) -> Describe:
    import torch
    from transformers import AutoTokenizer, Florence2ForConditionalGeneration

    model, tokenizer = _weights(Florence2ForConditionalGeneration, folder), AutoTokenizer.from_pretrained(folder)
    about, picture = _json(folder, "preprocessor_config.json"), model.config.image_token_id
    side, places = about["size"]["height"], about.get("image_seq_length", 577)
    words = tokenizer(TASK, add_special_tokens=False).input_ids
    prompt = [picture] * places + [tokenizer.bos_token_id, *words, tokenizer.eos_token_id]

    @torch.no_grad()
    def describe(pictures: list[Image.Image]) -> list[str]:
        pixels = _pixels(pictures, side, about, model)
        ids = torch.tensor([prompt] * len(pictures), device=model.device)
        tokens = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, **DECODING)
        return [_whole(text) for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    return describe


def _whole(text: str) -> str:
    """A text that the limit of tokens may have cut, up to its last whole sentence if it has one."""
    text = text.strip()
    end = text.rfind(". ")
    return text if text.endswith(".") or end < 0 else text[: end + 1]


def _tagger(folder: Path, config: dict) -> Describe:
    import torch
    from safetensors.torch import load_file

    try:
        import timm
    except ImportError:
        raise ValueError("a tagger needs the package timm, which is not here; run: pip install timm") from None
    device, dtype = _device()
    options = config.get("model_args") or {}
    model = timm.create_model(config["architecture"], num_classes=config["num_classes"], **options)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    model = model.to(device, dtype).eval().requires_grad_(False)
    with open(folder / "selected_tags.csv", encoding="utf-8", newline="") as handle:
        tags = [(row["name"], int(row["category"])) for row in csv.DictReader(handle)]
    about = config["pretrained_cfg"]
    side = about["input_size"][-1]
    like, least = torch.zeros(0, device=device, dtype=dtype), {0: TAG, 4: CHARACTER}  # categories; 9 is the rating
    norm = {"image_mean": about["mean"], "image_std": about["std"]}

    @torch.no_grad()
    def describe(pictures: list[Image.Image]) -> list[str]:
        pixels = _pixels([_square(picture) for picture in pictures], side, norm, like)
        chances = torch.sigmoid(model(pixels.flip(1)).float()).cpu()  # these models read blue, green, red
        return [_tags(row.tolist(), tags, least) for row in chances]

    return describe


def _square(picture: Image.Image) -> Image.Image:
    """The whole picture in the middle of a white square."""
    side = max(picture.size)
    square = Image.new("RGB", (side, side), "white")
    square.paste(picture.convert("RGB"), ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


def _tags(chances: list[float], tags: list[tuple[str, int]], least: dict[int, float]) -> str:
    """The tags that are likely enough, the likeliest first, with blanks for underscores (but in faces such as ^_^)."""
    found = [(chance, name) for chance, (name, category) in zip(chances, tags, strict=True)
             if chance > least.get(category, 2)]  # fmt: skip
    found.sort(key=lambda pair: -pair[0])
    return ", ".join(name.replace("_", " ") if len(name) > 3 else name for _, name in found)


LOADERS = {"blip": _blip, "florence2": _florence, "timm": _tagger}
