"""Pretraining, the U-Net with both text encoders: SDXL's parts and conventions, small."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from naruto_lora.tiny.pretrain_engine import Record, Trainer, plan, seeded, train
from naruto_lora.tiny.pretrain_pictures import CAPTIONS, load_captions, load_pictures
from naruto_lora.tiny.pretrain_vae import to_latents

BETAS: dict = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}
START, END = "<|startoftext|>", "<|endoftext|>"
TOKENS = 48  # positions of a caption
WORD = re.compile(r"[a-z]+|[0-9]|[^\sa-z0-9]+")


def _alphabet() -> list[str]:
    """The 256 characters that stand for bytes in CLIP's vocabularies; '!' comes first."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(256 - len(printable))]


def learn_merges(texts: Iterable[str], most: int = 1000) -> list[tuple[str, str]]:
    """Byte-pair merges, the most frequent pair first, until every word is one token or there are `most`."""
    counts = Counter(word for text in texts for word in WORD.findall(text.lower()))
    words = {(*word[:-1], word[-1] + "</w>"): count for word, count in counts.items()}
    merges: list[tuple[str, str]] = []
    while len(merges) < most:
        pairs: Counter = Counter()
        for word, count in words.items():
            for pair in zip(word, word[1:], strict=False):
                pairs[pair] += count
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        words = {_merged(word, best): count for word, count in words.items()}
    return merges


def _merged(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    out: list[str] = []
    for symbol in word:
        if out and (out[-1], symbol) == pair:
            out[-1] += symbol
        else:
            out.append(symbol)
    return tuple(out)


def write_tokenizers(folder: Path, texts: Iterable[str]) -> None:
    """Write tokenizer and tokenizer_2 (which pads with '!', as SDXL's does) as CLIPTokenizer's files."""
    merges = learn_merges(texts)
    letters = _alphabet()
    symbols = [*letters, *(x + "</w>" for x in letters), *("".join(m) for m in merges), START, END]
    vocabulary = {symbol: n for n, symbol in enumerate(dict.fromkeys(symbols))}
    for name, pad in (("tokenizer", END), ("tokenizer_2", "!")):
        path = folder / name
        path.mkdir(parents=True, exist_ok=True)
        special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
        config = special | {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": TOKENS,
            "do_lower_case": True,
        }
        files = {
            "vocab.json": vocabulary,
            "tokenizer_config.json": config,
            "special_tokens_map.json": special,
        }
        for file, data in files.items():
            (path / file).write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
        lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
        (path / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def load_tokenizers(folder: Path) -> list:
    from transformers import CLIPTokenizer

    return [CLIPTokenizer.from_pretrained(folder / name) for name in ("tokenizer", "tokenizer_2")]


def token_ids(tokenizers: list, texts: list[str]) -> np.ndarray:
    """(2, N, 48) int16: for each tokenizer the captions' ids, padded and cut as the pipeline does it.

    The two differ in padding only, so the second's ids are made from the first's, and compared on a sample.
    """
    one, two = tokenizers
    options = {"padding": "max_length", "max_length": TOKENS, "truncation": True}
    ids = np.array(one(texts, **options)["input_ids"], dtype=np.int16)
    ended = (ids == one.eos_token_id).cumsum(axis=1)  # 1 at the caption's end, more after it
    ids_2 = np.where(ended > 1, np.int16(two.pad_token_id), ids)
    if ids_2[:100].tolist() != two(texts[:100], **options)["input_ids"]:
        raise RuntimeError("the two tokenizers differ in more than their padding")
    return np.stack([ids, ids_2])


def _chunk_ids(job: tuple[Path, list[str]]) -> np.ndarray:
    return token_ids(load_tokenizers(job[0]), job[1])


def write_ids(folder: Path, kind: str) -> None:
    """<kind>_ids.npy (2, N, captions, 48) int16: the captions of a kind as both tokenizers' ids."""
    texts = [text for texts in load_captions(folder, kind) for text in texts]
    jobs = [(folder, texts[start : start + 10_000]) for start in range(0, len(texts), 10_000)]
    with multiprocessing.get_context("fork").Pool(min(os.cpu_count() or 1, len(jobs))) as pool:
        ids = np.concatenate(pool.map(_chunk_ids, jobs, chunksize=1), axis=1)
    np.save(folder / f"{kind}_ids.npy", ids.reshape(2, -1, CAPTIONS, TOKENS))


class Parts(nn.Module):
    """What is trained together: the U-Net and both text encoders."""

    def __init__(self, settings, tokenizers: list):
        from diffusers import UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

        super().__init__()
        one, two = settings.text_widths
        configs = [
            CLIPTextConfig(
                vocab_size=len(tokenizer.get_vocab()),
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=3,
                num_attention_heads=width // 32,
                max_position_embeddings=TOKENS,
                projection_dim=width,
                hidden_act=act,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
            for tokenizer, width, act in zip(tokenizers, (one, two), ("quick_gelu", "gelu"), strict=True)
        ]
        self.text_encoder = CLIPTextModel(configs[0])
        self.text_encoder_2 = CLIPTextModelWithProjection(configs[1])
        self.unet = UNet2DConditionModel(
            sample_size=settings.size // 4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=settings.unet_channels,
            layers_per_block=2,
            transformer_layers_per_block=(1, 1, 2),
            attention_head_dim=(2, 2, 3),  # diffusers' name for the number of heads
            cross_attention_dim=one + two,
            use_linear_projection=True,
            norm_num_groups=16,
            addition_embed_type="text_time",
            addition_time_embed_dim=32,
            projection_class_embeddings_input_dim=two + 6 * 32,
        )

    def encode(self, ids: Tensor, ids_2: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 48) token ids -> prompt_embeds (B, 48, both widths), pooled (B, second width), as SDXL does."""
        first = self.text_encoder(ids, output_hidden_states=True)
        second = self.text_encoder_2(ids_2, output_hidden_states=True)
        return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), second.text_embeds


def noise_levels(device: torch.device) -> Tensor:
    """(1000,) fp32: the share of the signal's variance left at each timestep."""
    root = [BETAS[end] ** 0.5 for end in ("beta_start", "beta_end")]
    betas = torch.linspace(*root, BETAS["num_train_timesteps"], dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float().to(device)


def predictor(parts: Parts):
    """The U-Net as a plain function, in bf16 on CUDA, that a compiler can take."""

    def predict(noisy: Tensor, t: Tensor, embeds: Tensor, pooled: Tensor, time_ids: Tensor) -> Tensor:
        with torch.autocast(noisy.device.type, torch.bfloat16, enabled=noisy.is_cuda):
            added = {"text_embeds": pooled, "time_ids": time_ids}
            return parts.unet(noisy, t, embeds, added_cond_kwargs=added, return_dict=False)[0]

    return predict


def unet_loss(parts: Parts, predict):
    """Epsilon prediction; `keep` (B,) is 0 where the caption is dropped: zeros, as in the pipeline."""
    levels = noise_levels(parts.unet.device)

    def loss(latents, noise, t, ids, ids_2, keep, time_ids) -> dict[str, Tensor]:
        with torch.autocast(latents.device.type, torch.bfloat16, enabled=latents.is_cuda):
            embeds, pooled = parts.encode(ids, ids_2)
        signal = levels[t].view(-1, 1, 1, 1)
        noisy = signal.sqrt() * latents + (1 - signal).sqrt() * noise
        predicted = predict(noisy, t, embeds * keep.view(-1, 1, 1), pooled * keep.view(-1, 1), time_ids)
        return {"loss": F.mse_loss(predicted.float(), noise)}

    return loss


class Captioned:
    """Latents at both sizes and their captions' tokens, on the device; draws batches from them."""

    def __init__(self, folder: Path, kind: str, vae, scale: float, device: torch.device):
        pictures = load_pictures(folder, kind, device)
        self.latents = [
            to_latents(vae, pictures, half) * scale for half in (False, True)
        ]  # 16 x 16 and 8 x 8
        self.size = pictures.shape[-1]
        self.ids = torch.from_numpy(np.load(folder / f"{kind}_ids.npy")).to(device)
        self.sides = torch.tensor(
            [self.size // 2, self.size, 2 * self.size], device=device, dtype=torch.float32
        )

    def batch(self, count: int, generator: torch.Generator, half: bool, dropped: float) -> dict[str, Tensor]:
        """Random pictures, captions, timesteps, noise, and original sizes, which tell nothing."""
        device, latents = generator.device, self.latents[half]
        index = torch.randint(len(latents), (count,), generator=generator, device=device)
        which = torch.randint(CAPTIONS, (count,), generator=generator, device=device)
        original = self.sides[
            torch.randint(0 if half else 1, 3, (count, 1), generator=generator, device=device)
        ]
        zero, target = (
            torch.zeros_like(original),
            torch.full_like(original, self.size // 2 if half else self.size),
        )
        latents = latents[index]
        return {
            "latents": latents,
            "noise": torch.randn(latents.shape, generator=generator, device=device),
            "t": torch.randint(1000, (count,), generator=generator, device=device),
            "ids": self.ids[0][index, which].long(),
            "ids_2": self.ids[1][index, which].long(),
            "keep": (torch.rand(count, generator=generator, device=device) >= dropped).float(),
            "time_ids": torch.cat([original, original, zero, zero, target, target], dim=1),
        }


def train_unet(
    folder: Path, vae, scale: float, record: Record, settings, device: torch.device, reserve: float
) -> Parts:
    """Train the U-Net and text encoders, resuming from unet.pt; returns them with the averaged weights.

    `reserve`: seconds of the whole plan to leave for what comes after. Raises Stop at the minutes' end.
    """
    record.need(70.0)  # to compile and to make some steps
    tokenizers = load_tokenizers(folder)
    torch.manual_seed(settings.seed * 16 + 4)
    parts, path = Parts(settings, tokenizers).to(device).train(), folder / "unet.pt"
    data = Captioned(folder, "ordinary", vae, scale, device)
    record.say(
        f"unet: {len(data.latents[0])} pictures encoded, captions of {len(tokenizers[0].get_vocab())} tokens"
    )
    generator, trainer = torch.Generator(device), Trainer([parts], record.say)

    def inputs(step: int, half: bool) -> dict[str, Tensor]:
        return data.batch(
            settings.unet_batch, seeded(generator, settings.seed, 4, step), half, settings.dropped
        )

    weights, plain, predict = trainer.weights(), unet_loss(parts, predictor(parts)), predictor(parts)
    ways = {"plain": plain}
    if record.get("unet", "way", "compiled") == "compiled":
        ways["compiled"] = unet_loss(parts, torch.compile(predict, dynamic=False))
    way, ms = trainer.prepare("whole", inputs(0, False), ways)
    _, half_ms = trainer.prepare("half", inputs(0, True), {"plain": plain})
    trainer.reset(weights)
    if path.exists():
        trainer.load(path)
    early, share = settings.half_size_first, settings.half_size_later
    halves = early + (1 - early) * share
    seconds = settings.total_minutes * 60 - record.spent() - reserve
    seconds = min(seconds, record.left() - reserve) if record.finish else seconds
    mixed = halves * half_ms + (1 - halves) * ms
    steps = plan(record, "unet", settings.unet_steps, seconds, mixed, trainer.step)
    record.note("unet", way=way, ms_a_step=round(ms, 2), ms_a_half_size_step=round(half_ms, 2))

    def batch(step: int) -> tuple[str, dict[str, Tensor]]:
        half = step < early * steps or step % round(1 / share) == 0
        return ("half" if half else "whole"), inputs(step, half)

    train(trainer, record, "unet", steps, settings.unet_rate, batch, path)
    trainer.use_averages()
    parts.eval().requires_grad_(False)
    held = Captioned(folder, "ordinary_held_out", vae, scale, device)
    record.note("unet", held_out_loss=round(held_out_loss(parts, held, settings, device), 5))
    return parts


@torch.no_grad()
def held_out_loss(parts: Parts, data: Captioned, settings, device: torch.device) -> float:
    """Mean loss over twenty fixed batches of unseen pictures at full size, no caption dropped."""
    generator, loss = torch.Generator(device), unet_loss(parts, predictor(parts))
    batches = [
        data.batch(settings.unet_batch, seeded(generator, settings.seed, 5, n), False, 0.0) for n in range(20)
    ]
    return sum(loss(**batch)["loss"].item() for batch in batches) / len(batches)
