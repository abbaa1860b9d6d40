"""Encode once: captions to prompt_embeds and pooled, pictures to latents, on disk, keyed by what made them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from . import data, memory, models


@dataclass(frozen=True)
class Cache:
    """Encoded examples, one file a picture and one a caption, read when first asked for and then kept.

    At 1024 px that is 0.6 MB an example: 0.7 GB of host memory for 1,221.
    """

    latents: tuple[Path, ...]
    prompts: tuple[Path, ...]
    loaded: dict = field(default_factory=dict, repr=False, compare=False)

    def _read(self, path: Path) -> dict[str, torch.Tensor]:
        if path not in self.loaded:
            self.loaded[path] = load_file(path)
        return self.loaded[path]

    def part(self, start: int, stop: int) -> Cache:
        """The examples from `start` up to `stop`."""
        return Cache(self.latents[start:stop], self.prompts[start:stop])

    def __len__(self) -> int:
        return len(self.latents)

    def fingerprint(self) -> str:
        """Sixteen hex digits of which pictures and captions these are, and what encoded them."""
        names = "|".join(path.name for path in self.latents + self.prompts)
        return hashlib.sha256(names.encode()).hexdigest()[:16]

    @property
    def shape(self) -> tuple[int, int, int]:
        """A latent's (4, h, w)."""
        return tuple(self._read(self.latents[0])["mean"].shape)

    def batch(self, indices, latent_noise: torch.Tensor, dropped: torch.Tensor, device) -> dict[str, torch.Tensor]:
        """The inputs of `diffusion_loss` for `indices`, on `device`.

        Latents are sampled from the VAE's distribution by `latent_noise` (B, 4, h, w); where `dropped` (B,) the
        caption is zeros, as SDXL's pipeline does for an empty negative prompt.
        """
        pictures = [self._read(self.latents[i]) for i in indices]
        prompts = [self._read(self.prompts[i]) for i in indices]
        mean, std = (torch.stack([p[name].float() for p in pictures]) for name in ("mean", "std"))
        kept = (~dropped).float()
        embeds = torch.stack([p["prompt_embeds"] for p in prompts])
        pooled = torch.stack([p["pooled"] for p in prompts])
        batch = {
            "latents": mean + std * latent_noise,  # (B, 4, h, w)
            "prompt_embeds": embeds * kept[:, None, None].to(embeds.dtype),  # (B, L, D)
            "pooled": pooled * kept[:, None].to(pooled.dtype),  # (B, P)
            "time_ids": torch.stack([p["time_ids"] for p in pictures]),  # (B, 6)
        }
        return {name: value.to(device) for name, value in batch.items()}


def encode(examples: list[data.Example], recipe, folder: str | Path, show=None) -> Cache:
    """Encodes what `folder` lacks, text first, then pictures, each encoder freed after its turn.

    `show(phase, done, total)` is called after each batch. A killed run goes on: finished files stay.
    Raises ValueError for an unreadable picture or a latent that is not finite, naming the picture.
    """
    folder = Path(folder)
    device, dtype = models.device_for(recipe.precision), models.DTYPES[recipe.precision]
    text_key = f"{models.identity(recipe.base)}|{recipe.precision}"
    vae_key = f"{models.identity(recipe.vae or recipe.base)}|{recipe.precision}|{recipe.resolution}"
    prompts = [folder / "prompts" / _name(text_key, e.caption.encode()) for e in examples]
    latents = [folder / "latents" / _name(vae_key, e.read()) for e in examples]
    for kind in ("prompts", "latents"):
        (folder / kind).mkdir(parents=True, exist_ok=True)

    missing = {path: e.caption for path, e in zip(prompts, examples, strict=True) if not path.exists()}
    if missing:
        encoders = models.load_text_encoders(recipe.base, dtype, device)
        _in_batches(missing, 16, "captions", show, lambda texts: encode_prompts(encoders, texts))
        del encoders
        memory.free()
    missing = {path: e for path, e in zip(latents, examples, strict=True) if not path.exists()}
    if missing:
        vae = models.load_vae(recipe.base, recipe.vae, dtype, device)
        size = max(1, min(32, 1024**2 // recipe.resolution**2))
        _in_batches(missing, size, "pictures", show, lambda batch: encode_pictures(vae, batch, recipe.resolution))
        del vae
        memory.free()
    return Cache(tuple(latents), tuple(prompts))


def _name(key: str, content: bytes) -> str:
    return hashlib.sha256(key.encode() + b"\0" + content).hexdigest()[:32] + ".safetensors"


def _in_batches(missing: dict[Path, object], size: int, phase: str, show, encoder) -> None:
    paths = list(missing)
    for start in range(0, len(paths), size):
        part = paths[start : start + size]
        for path, tensors in zip(part, encoder([missing[path] for path in part]), strict=True):
            temporary = path.with_suffix(".writing")
            save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, temporary)
            temporary.rename(path)
        if show:
            show(phase, start + len(part), len(paths))


@torch.no_grad()
def encode_prompts(encoders, texts: list[str]) -> list[dict[str, torch.Tensor]]:
    """prompt_embeds (L, D) of both encoders' last but one layers, pooled (P,) of the second, for each text.

    Source: StableDiffusionXLPipeline.encode_prompt in diffusers.
    """
    hidden = []
    for tokenizer, encoder in encoders:
        tokens = tokenizer(
            texts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        )
        output = encoder(tokens.input_ids.to(encoder.device), output_hidden_states=True)
        hidden.append(output.hidden_states[-2])
    embeds, pooled = torch.cat(hidden, dim=-1), output.text_embeds
    return [{"prompt_embeds": e, "pooled": p} for e, p in zip(embeds, pooled, strict=True)]


@torch.no_grad()
def encode_pictures(vae, examples: list[data.Example], resolution: int) -> list[dict[str, torch.Tensor]]:
    """Latents' mean and std (4, h, w), scaled for the U-Net, and time_ids (6,), for each example."""
    crops = [data.crop(example.image(), resolution) for example in examples]
    images = data.pixels([image for image, _ in crops]).to(vae.device, vae.dtype)
    posterior = vae.encode(images).latent_dist
    scale = vae.config.scaling_factor
    rows = []
    for example, mean, std, (_, ids) in zip(examples, posterior.mean, posterior.std, crops, strict=True):
        if not (mean.isfinite().all() and std.isfinite().all()):
            raise ValueError(
                f"the VAE gave latents that are not finite for '{example.name}'; take the fp16-fix VAE or fp32"
            )
        rows.append({"mean": mean * scale, "std": std * scale, "time_ids": torch.tensor(ids, dtype=torch.float32)})
    return rows
