"""Encode once: captions to prompt_embeds and pooled, pictures to latents, in shards on disk, keyed by content."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import safe_open

from . import data, models
from .disk.shards import Entry, Fits, Mirror, Shards, is_full, key_of
from .memory import gpu
from .reading import picture

VAE_NUMBERS = 1024  # numbers that the VAE's encoder holds per pixel: 2 GiB for a picture of 1024 px in fp16


@dataclass(frozen=True)
class Cache:
    """Encoded examples: the keys of their entries in memory-mapped shards, read from disk when needed."""

    names: tuple[str, ...]  # of the examples, for messages
    shapes: tuple[tuple[int, int, int], ...]  # each latent's (4, h, w)
    latents: tuple[str, ...]  # keys: 32 hex digits each
    mirrored: tuple[str, ...]  # keys of the mirrored pictures; the unmirrored key if it is never flipped
    prompts: tuple[str, ...]
    shards: dict[str, safe_open] = field(repr=False, compare=False)  # by key

    def part(self, start: int, stop: int) -> Cache:
        """The examples from `start` up to `stop`."""
        columns = ("names", "shapes", "latents", "mirrored", "prompts")
        return replace(self, **{name: getattr(self, name)[start:stop] for name in columns})

    def __len__(self) -> int:
        return len(self.latents)

    def batch(self, indices, latent_noise, dropped: torch.Tensor, flipped: torch.Tensor, device) -> dict:
        """The inputs of `diffusion_loss` for `indices`, whose latents have one shape, on `device`.

        `latent_noise`, B tensors (4, h, w), samples latents from the VAE's distribution. `dropped` (B,) captions are
        zeros, as SDXL's pipeline uses for an empty negative prompt; `flipped` (B,) pictures are mirrored.
        """
        turned = zip(indices, flipped.tolist(), strict=True)
        pictures = [self.mirrored[i] if turn else self.latents[i] for i, turn in turned]
        prompts = [self.prompts[i] for i in indices]
        mean, std = (self._stack(pictures, name).float() for name in ("mean", "std"))
        embeds, pooled = (self._stack(prompts, name) for name in ("prompt_embeds", "pooled"))
        kept = (~dropped).to(embeds.dtype)
        batch = {
            "latents": mean + std * torch.stack(tuple(latent_noise)),  # (B, 4, h, w)
            "prompt_embeds": embeds * kept[:, None, None],  # (B, L, D)
            "pooled": pooled * kept[:, None],  # (B, P)
            "time_ids": self._stack(pictures, "time_ids"),  # (B, 6)
        }
        return {name: gpu.send(value, device) for name, value in batch.items()}

    def prompts_of(self, indices, device) -> dict[str, torch.Tensor]:
        """prompt_embeds (B, L, D) and pooled (B, P) of `indices`, on `device`."""
        keys = [self.prompts[i] for i in indices]
        return {name: self._stack(keys, name).to(device) for name in ("prompt_embeds", "pooled")}

    def _stack(self, keys: list[str], name: str) -> torch.Tensor:
        return torch.stack([self.shards[key].get_tensor(f"{key}.{name}") for key in keys])


def encode(examples: list[data.Example], recipe, folder: str | Path, show=None, mirror=None, held: int = 0) -> Cache:
    """Encodes what `folder` lacks: first captions, then pictures; frees each encoder afterwards.

    With the recipe's `flip`, pictures are also encoded mirrored, except the last `held`, the hold-out. `mirror`, a
    folder whose parent exists (as on Google Drive), gets a copy of each shard and restores lost ones. Finished shards
    survive a kill, spoilt ones are made again. `show(phase, done, total)` is called after each batch. Raises ValueError
    for an unreadable picture, a latent or a caption's encoding that is not finite, with its name, and OSError if
    `folder` is full or can't be written.
    """
    text_key = f"{models.identity(recipe.base)}|{recipe.precision}"
    vae_key = f"{models.identity(recipe.vae or recipe.base)}|{recipe.precision}|{recipe.resolution}"
    vae_key += "|buckets" if recipe.buckets else ""
    prompts = tuple(key_of(text_key, e.caption.encode()) for e in examples)
    latents = tuple(key_of(vae_key, e.read()) for e in examples)
    flips = len(examples) - held if recipe.flip else 0
    mirrored = tuple(key_of("mirrored", key.encode()) for key in latents[:flips]) + latents[flips:]

    captions: dict = {key: e.caption for key, e in zip(prompts, examples, strict=True)}
    pictures: dict = dict(zip(latents, examples, strict=True))
    pictures |= {key: replace(e, mirrored=True) for key, e in zip(mirrored[:flips], examples[:flips], strict=True)}
    copies = Mirror(mirror, show)
    shards: dict[str, safe_open] = {}
    for kind, place, items, encoded, fits in (
        ("captions", "prompts", captions, _captions, _caption_fits(recipe)),
        ("pictures", "latents", pictures, _pictures, _picture_fits(recipe)),
    ):
        store = Shards(Path(folder) / place, fits, copies, show)
        shards |= store.find(items)
        missing = {key: item for key, item in items.items() if key not in shards}
        if missing:
            shards |= _fill(store, missing, encoded(missing, recipe), kind, show)
            gpu.free()
    shapes = tuple(tuple(shards[key].get_slice(f"{key}.mean").get_shape()) for key in latents)
    return Cache(tuple(e.name for e in examples), shapes, latents, mirrored, prompts, shards)


def _caption_fits(recipe) -> Fits:
    """Whether a caption's entry is what `encode_prompts` gives for the recipe."""
    dtype, shapes = models.DTYPES[recipe.precision], models.prompt_shapes(recipe.base)
    expected = {name: (dtype, shape) for name, shape in shapes.items()}
    return lambda entry: {name: (value.dtype, tuple(value.shape)) for name, value in entry.items()} == expected


def _picture_fits(recipe) -> Fits:
    """Whether a picture's entry is what `encode_pictures` gives; the latents' size must be that of its time_ids."""
    dtypes = (models.DTYPES[recipe.precision], torch.float32)  # a VAE that overflows in fp16 is in fp32
    factor, side = models.vae_scale_factor(recipe.base, recipe.vae), recipe.resolution

    def fits(entry: Entry) -> bool:
        ids = entry.get("time_ids", torch.empty(0))
        if entry.keys() != {"mean", "std", "time_ids"} or ids.shape != (6,) or ids.dtype != torch.float32:
            return False
        high, wide = ids[4:].tolist()
        shape = (4, high // factor, wide // factor)
        right = all(tuple(entry[name].shape) == shape and entry[name].dtype in dtypes for name in ("mean", "std"))
        return right and (recipe.buckets or (high, wide) == (side, side))

    return fits


Encoded = Generator[tuple[list[str], list[Entry]]]  # keys and tensors, a batch at a time


def _captions(missing: dict[str, str], recipe) -> Encoded:
    device, dtype = models.device_for(recipe.precision), models.DTYPES[recipe.precision]
    encoders = models.load_text_encoders(recipe.base, dtype, device)
    for keys in _batches(list(missing), 16):
        rows = encode_prompts(encoders, [missing[key] for key in keys])
        for key, row in zip(keys, rows, strict=True):
            if not all(value.isfinite().all() for value in row.values()):
                raise ValueError(f"the encoding of the caption '{missing[key]:.60}' is not finite; use fp32")
        yield keys, rows


def _pictures(missing: dict[str, data.Example], recipe) -> Encoded:
    """Threads decode ahead of the VAE; a batch is yielded while the next one is being encoded."""
    device, dtype = models.device_for(recipe.precision), models.DTYPES[recipe.precision]
    vae = models.load_vae(recipe.base, recipe.vae, dtype, device)
    side = recipe.resolution
    sizes: dict[tuple[int, int], list[str]] = {}
    for key, example in missing.items():
        size = picture.bucket(example.size(), side) if recipe.buckets else (side, side)
        sizes.setdefault(size, []).append(key)
    rows = ((missing[key], size) for size, keys in sizes.items() for key in keys)
    batches = [batch for keys in sizes.values() for batch in _batches(keys, _batch_size(vae, side))]
    running: tuple = ()
    with contextlib.closing(data.decode_ahead(rows)) as decoded:
        for keys in batches:
            crops = list(itertools.islice(decoded, len(keys)))
            started = keys, crops, encode_pictures(vae, crops), _record_event(device)
            if running:
                yield _finish(*running)
            running = started
    yield _finish(*running)


def _batch_size(vae, side: int) -> int:
    """How many pictures of side**2 px to encode together: up to 4 million px, and half of the free memory."""
    if vae.device.type == "cpu":
        return max(1, min(32, 1024**2 // side**2))
    need = VAE_NUMBERS * vae.dtype.itemsize * side**2
    return max(1, min(32, 4 * 1024**2 // side**2, gpu.available(vae.device) // (2 * need)))


def _record_event(device: torch.device):
    """A CUDA event after the work that the GPU has got so far; None on the CPU, where it is done already."""
    if device.type == "cpu":
        return None
    event = torch.cuda.Event()
    event.record()
    return event


def _finish(keys: list[str], crops: list[data.Crop], moments: torch.Tensor, event) -> tuple[list[str], list[dict]]:
    """Waits for a batch; returns its keys and entries. Raises ValueError if one is not finite."""
    if event:
        event.synchronize()
    for crop, finite in zip(crops, moments.isfinite().flatten(1).all(1).tolist(), strict=True):
        if not finite:
            raise ValueError(f"the VAE's latents of '{crop.name}' are not finite; use the fp16-fix VAE or fp32")
    ids = torch.tensor([crop.time_ids for crop in crops], dtype=torch.float32)
    return keys, [{"mean": mean, "std": std, "time_ids": row} for (mean, std), row in zip(moments, ids, strict=True)]


def _batches(rows: list, size: int) -> list[list]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


@torch.no_grad()
def encode_prompts(encoders, texts: list[str]) -> list[dict[str, torch.Tensor]]:
    """For each text, prompt_embeds (L, D) from both encoders' last but one layers and pooled (P,) from the second.

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
def encode_pictures(vae, crops: list[data.Crop]) -> torch.Tensor:
    """Mean and std (B, 2, 4, h, w) of the latents of crops of one size, scaled for the U-Net, in host memory.

    The GPU may still be computing: synchronize before you read them.
    """
    pinned = vae.device.type == "cuda"  # so that the copy to the GPU does not block the host
    stack = torch.empty(len(crops), *crops[0].pixels.shape, dtype=torch.uint8, pin_memory=pinned)
    torch.stack([torch.from_numpy(crop.pixels) for crop in crops], out=stack)
    images = data.normalize(stack.to(vae.device, non_blocking=True)).to(vae.dtype)
    posterior = vae.encode(images).latent_dist
    moments = torch.stack([posterior.mean, posterior.std], 1) * vae.config.scaling_factor
    return moments.to("cpu", non_blocking=True)


def _fill(store: Shards, missing: dict, encoded: Encoded, phase: str, show) -> dict[str, safe_open]:
    """Writes what `encoded` yields for `missing` into shards, each when it is full; returns them by key."""
    entries: dict[str, Entry] = {}
    written: dict[str, safe_open] = {}
    done = 0
    with contextlib.closing(encoded):  # so that an interrupt stops its threads too
        for keys, rows in encoded:
            for key, row in zip(keys, rows, strict=True):
                entries[key] = {name: value.cpu().contiguous() for name, value in row.items()}
                done += 1
                if done == len(missing) or is_full(entries):
                    written |= store.write(entries, len(missing) - done)
                    entries = {}
            if show:
                show(phase, done, len(missing))
    return written
