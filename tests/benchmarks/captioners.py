"""Captioners at full size with random weights: seconds and memory for a data set of many pictures.

    python tests/benchmarks/captioners.py --out DIR [--pictures 1221] [--size 1024] [--cap 14.56] [--captioner blip ...]

Needs no download: each model is made from its own repository's settings, saved in its layout, and loaded by the code
that loads the real one. Random weights write to the limit of tokens, so a real caption, which ends earlier, takes less
time. Without a GPU, `--pictures 8` tries the script itself (a GB of memory).
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from naruto_lora.captioning import captioners, write
from naruto_lora.memory import gpu
from naruto_lora.progress import Progress

MEAN = {"blip": captioners.CLIP[0], "florence-2": [0.485, 0.456, 0.406]}
STD = {"blip": captioners.CLIP[1], "florence-2": [0.229, 0.224, 0.225]}


def pictures(folder: Path, count: int, size: int) -> Path:
    """JPEGs of `size` px, of smooth noise: as large as drawings are."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for k in range(count):
        if not (file := folder / f"{k:04d}.jpg").exists():
            small = Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8))
            small.resize((size, size), Image.BICUBIC).save(file, quality=90)
    return folder


def blip(folder: Path) -> None:
    """BLIP large: a ViT-L of 384 px and BERT base."""
    from tokenizers import Tokenizer, models
    from transformers import BertTokenizerFast, BlipConfig, BlipForConditionalGeneration

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
    words = {token: k for k, token in enumerate([*special, *(f"w{k}" for k in range(30524 - len(special)))])}
    BertTokenizerFast(tokenizer_object=Tokenizer(models.WordPiece(words, unk_token="[UNK]")), unk_token="[UNK]",
                      sep_token="[SEP]", pad_token="[PAD]", cls_token="[CLS]").save_pretrained(folder)  # fmt: skip
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
              "image_size": 384, "initializer_range": 0.02}  # fmt: skip
    text = {"num_attention_heads": 12, "bos_token_id": 5, "sep_token_id": 3}
    BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision)).save_pretrained(folder)
    settings(folder, "blip", 384)


def florence(folder: Path) -> None:
    """Florence-2 base: DaViT of 768 px and BART with six layers a side."""
    from tokenizers import pre_tokenizers
    from transformers import BartTokenizer, Florence2Config, Florence2ForConditionalGeneration

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    marks = ["<s>", "<pad>", "</s>", "<unk>"]
    tokenizer = BartTokenizer(vocab={token: k for k, token in enumerate([*marks, *letters])}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.add_tokens([f"w{k}" for k in range(51289 - len(tokenizer))])
    tokenizer.save_pretrained(folder)
    text = {"vocab_size": 51289, "d_model": 768, "encoder_layers": 6, "decoder_layers": 6, "forced_bos_token_id": 0,
            "encoder_attention_heads": 12, "decoder_attention_heads": 12, "encoder_ffn_dim": 3072,
            "decoder_ffn_dim": 3072}  # fmt: skip
    vision = {"projection_dim": 768}
    picture = tokenizer.convert_tokens_to_ids("<image>")
    config = Florence2Config(text_config=text, vision_config=vision, image_token_id=picture)
    Florence2ForConditionalGeneration(config).save_pretrained(folder)
    settings(folder, "florence-2", 768)


def settings(folder: Path, name: str, side: int) -> None:
    about = {"size": {"height": side, "width": side}, "resample": 3, "image_mean": MEAN[name], "image_std": STD[name]}
    (folder / "preprocessor_config.json").write_text(json.dumps(about | {"image_seq_length": 577}))


MODELS = {"blip": blip, "florence-2": florence}


def measured(options, name: str) -> dict:
    """Seconds to load and to caption, and the most memory, of one captioner."""
    place = options.out / name
    if not (place / "preprocessor_config.json").exists():
        place.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        MODELS[name](place)
    folder = pictures(options.out / "pictures", options.pictures, options.size)
    for file in (*folder.glob("*.txt"), folder / "captions.jsonl"):
        file.unlink(missing_ok=True)
    gpu.free()
    gpu.reset_peak()
    begun, marks = time.monotonic(), []
    show = Progress()

    def watch(phase, done, total):
        marks.append((time.monotonic(), done))
        show(phase, done, total)

    report = write.caption(folder, str(place), show=watch)
    whole, (first, some), (last, all_) = time.monotonic() - begun, marks[0], marks[-1]
    free = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    return {"captioner": name, "pictures": options.pictures, "captions": report.made, "seconds": round(whole, 1),
            "pictures_per_second": round((all_ - some) / max(last - first, 1e-9), 2),
            "before_the_first_s": round(first - begun, 1), "peak_gib": gpu.peak_gib(), "left_bytes": free,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=1221)
    parser.add_argument("--size", type=int, default=1024, help="px")
    parser.add_argument("--cap", type=float, help="GiB of the card")
    parser.add_argument("--captioner", nargs="+", choices=MODELS, default=list(MODELS))
    options = parser.parse_args()
    if options.cap and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(options.cap * gpu.GIB / torch.cuda.mem_get_info()[1])
    rows = [measured(options, name) for name in options.captioner]
    (options.out / "captioners.json").write_text(json.dumps(rows, indent=1))
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
