"""Pretraining, the VAE: pictures to 4 x 16 x 16 latents and back. It never sees the style to learn."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from naruto_lora.tiny.judge import Judge
from naruto_lora.tiny.pretrain_engine import Record, Trainer, plan, seeded, train
from naruto_lora.tiny.pretrain_judge import accuracy
from naruto_lora.tiny.pretrain_pictures import load_labels, load_pictures, pick, sheet, uniform

NOISE = 0.05  # the latents' own uncertainty, their spread being 1: what `latent_dist.sample()` adds


def make_vae(settings):
    """SDXL's AutoencoderKL, small: factor 4, 4 latent channels."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=settings.vae_channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=settings.size,
        scaling_factor=1.0,  # measured at the end
        force_upcast=False,
    )


def encode(vae, pictures: Tensor) -> Tensor:
    """(B, 3, H, W) in -1..1 -> (B, 8, H/4, W/4): means and log-variances."""
    return vae.quant_conv(vae.encoder(pictures))


def decode(vae, latents: Tensor) -> Tensor:
    return vae.decoder(vae.post_quant_conv(latents))


def _half_plane(shape: torch.Size, generator: torch.Generator, softness: float) -> Tensor:
    """(B, 1, H, W) from 0 to 1 across a random line through each picture."""
    count, _, height, width = shape
    angle = uniform(generator, count, 0, 2 * math.pi)
    y = torch.arange(height, device=generator.device).view(1, 1, -1, 1) - height * uniform(
        generator, count, 0.2, 0.8
    )
    x = torch.arange(width, device=generator.device).view(1, 1, 1, -1) - width * uniform(
        generator, count, 0.2, 0.8
    )
    return torch.sigmoid((x * angle.cos() + y * angle.sin()) * softness)


def _outlines(x: Tensor, generator: torch.Generator) -> Tensor:
    """Lay dark lines, 1 to 2 pixels wide, along strong edges."""
    count = len(x)
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    wide = (F.max_pool2d(padded, 3, 1) + F.max_pool2d(-padded, 3, 1)).amax(1, keepdim=True)
    padded = F.pad(x, (0, 1, 0, 1), mode="replicate")
    thin = (F.max_pool2d(padded, 2, 1) + F.max_pool2d(-padded, 2, 1)).amax(1, keepdim=True)
    edge = torch.where(uniform(generator, count) < 0.35, wide, thin)
    mask = ((edge - uniform(generator, count, 0.3, 0.6)) * 8).clamp(0, 1) * uniform(
        generator, count, 0.6, 1.0
    )
    ink = torch.rand(count, 3, 1, 1, generator=generator, device=x.device) * 0.18
    return x + mask * (ink - x)


def _strokes(x: Tensor, generator: torch.Generator, number: int = 5) -> Tensor:
    """Draw straight strokes, mostly dark, 1 to 4 pixels wide."""
    count, _, height, width = x.shape
    ends = torch.rand(count, number, 4, 1, 1, generator=generator, device=x.device) * 1.2 - 0.1
    x0, y0, x1, y1 = (ends * width).unbind(2)  # each (B, n, 1, 1)
    rows = torch.arange(height, device=x.device, dtype=x.dtype).view(1, 1, -1, 1)
    columns = torch.arange(width, device=x.device, dtype=x.dtype).view(1, 1, 1, -1)
    dx, dy = x1 - x0, y1 - y0
    along = (((columns - x0) * dx + (rows - y0) * dy) / (dx * dx + dy * dy + 1e-3)).clamp(0, 1)
    distance = ((columns - x0 - along * dx) ** 2 + (rows - y0 - along * dy) ** 2 + 1e-6).sqrt()
    half = torch.rand(count, number, 1, 1, generator=generator, device=x.device) * 1.5 + 0.5
    mask = (half + 0.5 - distance).clamp(0, 1).amax(1, keepdim=True)  # (B, 1, H, W)
    color = torch.rand(count, 3, 1, 1, generator=generator, device=x.device)
    color = torch.where(uniform(generator, count) < 0.75, color * 0.18, color)
    return x + mask * (color - x)


def disturb(x: Tensor, generator: torch.Generator) -> Tensor:
    """Widen what the VAE sees: outlines, strokes, hard shadows, other colours, pictures joined along a line.

    (B, 3, H, W) in 0..1 -> the same in -1..1.
    """
    count = len(x)

    def some(share: float, changed: Tensor, plain: Tensor) -> Tensor:
        return torch.where(uniform(generator, count) < share, changed, plain)

    x = some(0.5, x.flip(3), x)
    x = some(0.15, torch.lerp(x, x.roll(1, 0), _half_plane(x.shape, generator, 4.0)), x)
    order = torch.rand(count, 3, generator=generator, device=x.device).argsort(1).view(count, 3, 1, 1)
    x = some(0.12, x.gather(1, order.expand_as(x)), x)
    grey = x.mean(1, keepdim=True)
    x = some(0.3, grey + (x - grey) * uniform(generator, count, 0.6, 1.5), x)
    shadow = 1 - uniform(generator, count, 0.1, 0.5) * _half_plane(x.shape, generator, 3.0)
    x = some(0.25, x * shadow, x)
    x = some(0.35, _outlines(x, generator), x)
    x = some(0.25, _strokes(x, generator), x)
    return x.clamp(0, 1) * 2 - 1


def _slopes(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., :, 1:] - x[..., :, :-1], x[..., 1:, :] - x[..., :-1, :]


def vae_loss(vae, critic: Judge):
    """Pixels, slopes and the critic's features; latents pushed to mean 0, spread 1 and noise NOISE."""

    def loss(pictures: Tensor, noise: Tensor) -> dict[str, Tensor]:
        with torch.autocast(pictures.device.type, torch.bfloat16, enabled=pictures.is_cuda):
            mean, log_variance = encode(vae, pictures).float().chunk(2, dim=1)
            decoded = decode(vae, mean + noise).float()
            wanted = critic.maps(pictures)
            shown = critic.maps(decoded)
        pixels = (decoded - pictures).abs().mean() + 2 * F.mse_loss(decoded, pictures)
        pairs = zip(_slopes(decoded), _slopes(pictures), strict=True)
        slopes = sum((a - b).abs().mean() for a, b in pairs)
        pairs = zip(shown, wanted, strict=True)
        features = sum(
            (a.float() - b.float()).abs().mean() / (b.float().abs().mean() + 1e-3) for a, b in pairs
        )
        channels = mean.transpose(0, 1).flatten(1)  # (4, B * h * w)
        spread = (channels.mean(1) ** 2).sum() + ((channels.std(1) - 1) ** 2).sum()
        kl = ((log_variance - 2 * math.log(NOISE)) ** 2).mean()
        total = pixels + 0.5 * slopes + 0.08 * features + 0.02 * spread + 1e-4 * kl
        return {"loss": total, "pixels": pixels, "slopes": slopes, "features": features, "spread": spread}

    return loss


def _batches(folder: Path, settings, device: torch.device):
    """`batch(step)`: 70% ordinary pictures, 30% shapes, disturbed; every fifth batch at half the size."""
    ordinary, shapes = load_pictures(folder, "ordinary", device), load_pictures(folder, "shapes", device)
    generator, count = torch.Generator(device), settings.vae_batch

    def batch(step: int) -> tuple[str, dict[str, Tensor]]:
        seeded(generator, settings.seed, 3, step)
        few = round(0.3 * count)
        x = torch.cat([pick(ordinary, count - few, generator)[0], pick(shapes, few, generator)[0]])
        x = disturb(x[torch.randperm(count, generator=generator, device=device)], generator)
        x = F.avg_pool2d(x, 2) if step % 5 == 4 else x
        noise = torch.randn(count, 4, x.shape[2] // 4, x.shape[3] // 4, generator=generator, device=device)
        noise = noise * uniform(generator, count, 0.0, 0.12)
        return f"{x.shape[-1]} px", {"pictures": x, "noise": noise}

    return batch


def train_vae(folder: Path, critic: Judge, record: Record, settings, device: torch.device):
    """Train the VAE, resuming from vae.pt; returns it with averaged weights. Raises Stop when time is up."""
    torch.manual_seed(settings.seed * 16 + 3)
    vae = make_vae(settings).to(device)
    batch, path = _batches(folder, settings, device), folder / "vae.pt"
    trainer = Trainer([vae], record.say)
    weights, loss = trainer.weights(), vae_loss(vae, critic)
    ways = {"plain": loss}
    if record.get("vae", "way", "compiled") == "compiled":
        ways["compiled"] = torch.compile(loss, dynamic=False)
    (large, inputs), (small, small_inputs) = batch(0), batch(4)
    way, ms = trainer.prepare(large, inputs, ways)
    _, small_ms = trainer.prepare(small, small_inputs, {"plain": loss})
    trainer.reset(weights)
    if path.exists():
        trainer.load(path)
    record.note("vae", way=way, ms_a_step=round(ms, 2), ms_a_small_step=round(small_ms, 2))
    seconds = settings.vae_seconds - record.get("vae", "trained", 0.0)
    began = record.spent()
    steps = plan(record, "vae", settings.vae_steps, seconds, 0.8 * ms + 0.2 * small_ms, trainer.step)
    try:
        train(trainer, record, "vae", steps, settings.vae_rate, batch, path)
    finally:
        record.note("vae", trained=record.get("vae", "trained", 0.0) + record.spent() - began)
    trainer.use_averages()
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def to_latents(vae, pictures: Tensor, half: bool = False) -> Tensor:
    """(N, 3, H, W) uint8 -> (N, 4, h, w) unscaled means; `half` first halves the pictures' side."""
    found = []
    for start in range(0, len(pictures), 1000):
        x = pictures[start : start + 1000].float() / 127.5 - 1
        found.append(encode(vae, F.avg_pool2d(x, 2) if half else x)[:, :4])
    return torch.cat(found)


@torch.no_grad()
def round_trip(vae, pictures: Tensor) -> Tensor:
    """(N, 3, H, W) uint8 -> the same pictures decoded from their latents, in 0..1."""
    latents = to_latents(vae, pictures)
    return torch.cat([(decode(vae, part) / 2 + 0.5).clamp(0, 1) for part in latents.split(1000)])


def check_vae(vae, judge: Judge, folder: Path, reports: Path, record: Record, device: torch.device) -> None:
    """Measure what survives a round trip, for ordinary pictures and for the style, and show forty of each."""
    for kind in ("ordinary", "style"):
        pictures = load_pictures(folder, f"{kind}_held_out", device)
        labels = load_labels(folder, f"{kind}_held_out", device)
        drawn, back = pictures.float() / 255, round_trip(vae, pictures)
        psnr = -10 * torch.log10(((back - drawn) ** 2).mean((1, 2, 3))).mean().item()
        small = F.avg_pool2d(drawn, 2)
        small_back = (decode(vae, to_latents(vae, pictures, half=True)) / 2 + 0.5).clamp(0, 1)
        small_psnr = -10 * torch.log10(((small_back - small) ** 2).mean((1, 2, 3))).mean().item()
        figures = {
            "psnr": round(psnr, 2),
            "psnr_half_size": round(small_psnr, 2),
            "read": accuracy(judge, back, labels),
        }
        record.note("vae", **{kind: figures})
        record.say(f"vae, {kind} after a round trip: {figures}")
        rows = [
            part for n in range(0, min(40, len(drawn)), 10) for part in (drawn[n : n + 10], back[n : n + 10])
        ]
        sheet([row for row in rows if len(row) == 10], reports / f"vae_{kind}.png")
