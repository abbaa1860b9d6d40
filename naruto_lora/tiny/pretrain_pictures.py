"""Pretraining's pictures: drawn once by all cores into the work folder, then held on the device as uint8."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from naruto_lora.tiny import world

KINDS = ("ordinary", "shapes", "style", "ordinary_held_out", "shapes_held_out", "style_held_out")
CHUNK = 250  # pictures that share a random generator
CAPTIONS = 4  # a picture


def _draw_chunk(job: tuple[str, str, int, int, int]) -> tuple[np.ndarray, list[list[str]]]:
    """Draws one chunk into its rows of the array file. Returns its labels (n, 8) and captions."""
    path, kind, chunk, seed, size = job
    pictures = np.lib.format.open_memmap(path, mode="r+")
    rows = range(chunk * CHUNK, min(len(pictures), (chunk + 1) * CHUNK))
    rng = np.random.default_rng([seed, 1000 + KINDS.index(kind), chunk])
    labels, texts = np.zeros((len(rows), len(world.ATTRIBUTES)), np.uint8), []
    for n, row in enumerate(rows):
        if kind.startswith("shapes"):
            pictures[row] = np.asarray(world.draw_shapes(rng, size))
            continue
        attributes = world.sample(rng)
        texts.append([world.caption(attributes, rng) for _ in range(CAPTIONS)])
        style = world.STYLE if kind.startswith("style") else world.ORDINARY[rng.integers(len(world.ORDINARY))]
        pictures[row] = np.asarray(world.draw(attributes, style, rng, size))
        labels[n] = [classes.index(attributes[name]) for name, classes in world.ATTRIBUTES.items()]
    pictures.flush()
    return labels, texts


def draw_kind(folder: Path, kind: str, count: int, seed: int, size: int) -> None:
    """Draw `count` pictures of a kind: <kind>.npy (N, size, size, 3) uint8, labels (N, 8) uint8, captions."""
    path = folder / f"{kind}.npy"
    np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(count, size, size, 3)).flush()
    jobs = [(str(path), kind, chunk, seed, size) for chunk in range(-(-count // CHUNK))]
    with multiprocessing.get_context("fork").Pool(min(os.cpu_count() or 1, len(jobs))) as pool:
        done = pool.map(_draw_chunk, jobs, chunksize=1)
    np.save(folder / f"{kind}_labels.npy", np.concatenate([labels for labels, _ in done]))
    (folder / f"{kind}_captions.json").write_text(json.dumps([text for _, texts in done for text in texts]))


def load_pictures(folder: Path, kind: str, device: torch.device) -> Tensor:
    """(N, 3, H, W) uint8 on the device."""
    pictures = torch.from_numpy(np.load(folder / f"{kind}.npy")).to(device)
    return pictures.permute(0, 3, 1, 2).contiguous()


def load_labels(folder: Path, kind: str, device: torch.device) -> Tensor:
    """(N, 8) int64: the index of each attribute's class."""
    return torch.from_numpy(np.load(folder / f"{kind}_labels.npy")).long().to(device)


def load_captions(folder: Path, kind: str) -> list[list[str]]:
    return json.loads((folder / f"{kind}_captions.json").read_text())


def pick(pictures: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` random pictures as floats in 0..1, and their (count,) indices."""
    index = torch.randint(len(pictures), (count,), generator=generator, device=pictures.device)
    return pictures[index].float() / 255, index


def uniform(generator: torch.Generator, count: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    """(count, 1, 1, 1) random numbers, to do something to each picture of a batch in its own measure."""
    return torch.rand(count, 1, 1, 1, generator=generator, device=generator.device) * (high - low) + low


def sheet(rows: list[Tensor], path: Path, scale: int = 3) -> None:
    """Save rows of (N, 3, H, W) pictures in 0..1 as one PNG, enlarged without smoothing."""
    grid = torch.cat([torch.cat(list(row.cpu().float()), dim=2) for row in rows], dim=1)
    pixels = (grid.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels)
    picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST).save(path)


def captioned_sheet(pictures: list[Image.Image], texts: list[str], path: Path, columns: int = 8) -> None:
    """Save pictures at three times their size, their captions in small print below."""
    side, below, font = 192, 56, ImageFont.load_default(size=9)
    rows = -(-len(pictures) // columns)
    page = Image.new("RGB", (columns * side, rows * (side + below)), "white")
    pen = ImageDraw.Draw(page)
    for n, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
        x, y = n % columns * side, n // columns * (side + below)
        page.paste(picture.resize((side, side), Image.Resampling.NEAREST), (x, y))
        lines, line = list[str](), ""
        for word in text.split():
            fits = pen.textlength(f"{line} {word}", font=font) < side - 6
            lines, line = (lines, f"{line} {word}".strip()) if fits else ([*lines, line], word)
        pen.multiline_text((x + 3, y + side), "\n".join([*lines, line]), fill="black", font=font, spacing=1)
    page.save(path)
