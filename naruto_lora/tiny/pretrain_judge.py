"""Pretraining, the readers: the judge, and a critic of the same form whose features teach the VAE."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from naruto_lora.tiny.judge import Judge, split
from naruto_lora.tiny.pretrain_engine import Record, Trainer, plan, seeded, train
from naruto_lora.tiny.pretrain_pictures import load_labels, load_pictures, pick, uniform
from naruto_lora.tiny.world import ATTRIBUTES


def weather(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Shift, scale, blur, halve, tint and add noise, so that decoded and generated pictures are read fairly.

    (B, 3, 64, 64) in 0..1 -> the same in -1..1.
    """
    count = len(pictures)
    move = torch.zeros(count, 2, 3, device=pictures.device)
    scale = uniform(generator, count, 0.93, 1.07).view(count)
    move[:, 0, 0] = move[:, 1, 1] = scale
    move[:, :, 2] = (
        torch.rand(count, 2, generator=generator, device=pictures.device) * 0.16 - 0.08
    )  # of half a side
    grid = F.affine_grid(move, list(pictures.shape), align_corners=False)
    x = F.grid_sample(pictures, grid, padding_mode="reflection", align_corners=False)
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = x + uniform(generator, count, -0.4, 1.0) * (soft - x)  # from sharpened to blurred
    halved = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear", align_corners=False)
    x = torch.where(uniform(generator, count) < 0.15, halved, x)
    gain = 1 + 0.06 * torch.randn(count, 3, 1, 1, generator=generator, device=x.device).clamp(-2, 2)
    x = (
        (x - 0.5) * uniform(generator, count, 0.88, 1.12) * gain
        + 0.5
        + uniform(generator, count, -0.06, 0.06)
    )
    noise = torch.randn(x.shape, generator=generator, device=x.device)
    x = x + noise * uniform(generator, count, 0.0, 0.07) * (uniform(generator, count) < 0.5)
    return x.clamp(0, 1) * 2 - 1


def _loss_of(reader: Judge):
    def loss(pictures: Tensor, labels: Tensor, style: Tensor, style_weight: Tensor) -> dict[str, Tensor]:
        with torch.autocast(pictures.device.type, torch.bfloat16, enabled=pictures.is_cuda):
            logits = reader(pictures)
        attributes, in_style = split(logits.float())
        parts = [F.cross_entropy(a, labels[:, n]) for n, a in enumerate(attributes)]
        read, judged = torch.stack(parts).mean(), F.binary_cross_entropy_with_logits(in_style, style)
        return {"loss": read + style_weight * judged, "attributes": read, "style": judged}

    return loss


def train_reader(name: str, folder: Path, record: Record, settings, device: torch.device) -> Judge:
    """Train the judge (of ordinary pictures and the style) or the critic (of ordinary ones, another seed)."""
    stage = 1 if name == "judge" else 2
    torch.manual_seed(settings.seed * 16 + stage)
    reader = Judge().to(device).train()
    kinds = ("ordinary", "style") if name == "judge" else ("ordinary",)
    data = [(load_pictures(folder, kind, device), load_labels(folder, kind, device)) for kind in kinds]
    shares = [settings.judge_batch - settings.judge_batch // 4, settings.judge_batch // 4]
    shares = shares if len(data) > 1 else [settings.judge_batch]
    style = torch.cat([torch.full((n,), float(i), device=device) for i, n in enumerate(shares)])
    generator, weight = torch.Generator(device), torch.tensor(0.5 if len(data) > 1 else 0.0, device=device)

    def batch(step: int) -> tuple[str, dict[str, Tensor]]:
        seeded(generator, settings.seed, stage, step)
        picked = [pick(pictures, n, generator) for (pictures, _), n in zip(data, shares, strict=True)]
        labels = torch.cat([labels[i] for (_, labels), (_, i) in zip(data, picked, strict=True)])
        pictures = weather(torch.cat([p for p, _ in picked]), generator)
        return "64 px", {"pictures": pictures, "labels": labels, "style": style, "style_weight": weight}

    trainer = Trainer([reader], record.say)
    weights = trainer.weights()
    _, ms = trainer.prepare("64 px", batch(0)[1], {"plain": _loss_of(reader)})
    trainer.reset(weights)
    steps = plan(record, name, settings.judge_steps, settings.judge_seconds, ms)
    train(trainer, record, name, steps, settings.judge_rate, batch)
    return reader.eval().requires_grad_(False)


@torch.no_grad()
def accuracy(reader: Judge, pictures: Tensor, labels: Tensor) -> dict[str, float]:
    """Percent read right for each attribute, and "style": percent read as in the style. Pictures in 0..1."""
    right, style = torch.zeros(len(ATTRIBUTES)), 0.0
    for start in range(0, len(pictures), 500):
        part = pictures[start : start + 500].float()
        attributes, in_style = split(reader(part * 2 - 1))
        found = torch.stack([a.argmax(1) for a in attributes], dim=1)
        right += (found == labels[start : start + 500]).sum(0).cpu()
        style += (in_style > 0).sum().item()
    percent = (100 * right / len(pictures)).tolist()
    named = {name: round(p, 2) for name, p in zip(ATTRIBUTES, percent, strict=True)}
    return named | {"style": round(100 * style / len(pictures), 2)}


def load_reader(path: Path, device: torch.device) -> Judge:
    from safetensors.torch import load_file

    reader = Judge()
    reader.load_state_dict(load_file(path))
    return reader.to(device).float().eval().requires_grad_(False)
