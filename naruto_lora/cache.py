"""Encode once: captions to prompt_embeds and pooled, pictures to latents, in shards on disk, keyed by content."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import time
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from . import data, files, models
from .memory import gpu
from .progress import note
from .reading import picture

SHARD_BYTES, SHARD_ENTRIES = 16 * 2**20, 64  # either fills a shard: some 50 captions, or 64 pictures at 1024 px
VAE_NUMBERS = 1024  # numbers that the VAE's encoder holds per pixel: 2 GiB for a picture of 1024 px in fp16
ABANDONED = 3600.0  # seconds after which an unfinished file counts as left by a killed run


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
    survive a kill. `show(phase, done, total)` is called after each batch. Raises ValueError for an unreadable picture
    or a latent that is not finite, with the picture's name, and OSError if `folder` is full or can't be written.
    """
    text_key = f"{models.identity(recipe.base)}|{recipe.precision}"
    vae_key = f"{models.identity(recipe.vae or recipe.base)}|{recipe.precision}|{recipe.resolution}"
    vae_key += "|buckets" if recipe.buckets else ""
    prompts = tuple(_key(text_key, e.caption.encode()) for e in examples)
    latents = tuple(_key(vae_key, e.read()) for e in examples)
    flips = len(examples) - held if recipe.flip else 0
    mirrored = tuple(_key("mirrored", key.encode()) for key in latents[:flips]) + latents[flips:]

    captions: dict = {key: e.caption for key, e in zip(prompts, examples, strict=True)}
    pictures: dict = dict(zip(latents, examples, strict=True))
    pictures |= {key: replace(e, mirrored=True) for key, e in zip(mirrored[:flips], examples[:flips], strict=True)}
    copies = _Mirror(mirror, show)
    shards: dict[str, safe_open] = {}
    for kind, items, encoded in (("captions", captions, _captions), ("pictures", pictures, _pictures)):
        place = Path(folder) / ("prompts" if kind == "captions" else "latents")
        found = _find(place, items, copies, show)
        missing = {key: item for key, item in items.items() if key not in found}
        if missing:
            _fill(place, missing, encoded(missing, recipe), kind, copies, show)
            gpu.free()
            found = _by_key(_open(place, show))
        shards |= {key: found[key] for key in items}
    shapes = tuple(tuple(shards[key].get_slice(f"{key}.mean").get_shape()) for key in latents)
    return Cache(tuple(e.name for e in examples), shapes, latents, mirrored, prompts, shards)


def _key(kind: str, content: bytes) -> str:
    return hashlib.sha256(kind.encode() + b"\0" + content).hexdigest()[:32]


Encoded = Generator[tuple[list[str], list[dict[str, torch.Tensor]]]]  # keys and tensors, a batch at a time


def _captions(missing: dict[str, str], recipe) -> Encoded:
    device, dtype = models.device_for(recipe.precision), models.DTYPES[recipe.precision]
    encoders = models.load_text_encoders(recipe.base, dtype, device)
    for keys in _batches(list(missing), 16):
        yield keys, encode_prompts(encoders, [missing[key] for key in keys])


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


class _Shard(NamedTuple):
    path: Path
    open: safe_open
    keys: set[str]


def _open(folder: Path, show) -> list[_Shard]:
    """The shards in `folder`, memory-mapped; reports and removes broken ones."""
    shards = []
    for path in sorted(folder.glob("*.safetensors")):
        try:
            opened = safe_open(path, "pt")
        except FileNotFoundError:  # another run has removed it as broken
            continue
        except SafetensorError as error:
            note(show, f"'{path}' in the cache is broken ({error}): its entries are encoded again")
            path.unlink(missing_ok=True)
            continue
        shards.append(_Shard(path, opened, {name.rpartition(".")[0] for name in opened.keys()}))
    return shards


def _by_key(shards: Iterable[_Shard]) -> dict[str, safe_open]:
    return {key: shard.open for shard in shards for key in shard.keys}


def _find(folder: Path, keys: Iterable[str], copies: _Mirror, show) -> dict[str, safe_open]:
    """{key: its shard} in `folder`, which it creates, after copying shards with some of `keys` from the mirror."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob("*.writing"):
            if time.time() - path.stat().st_mtime > ABANDONED:
                path.unlink()
    except OSError as error:
        raise OSError(f"the cache folder '{folder}' can't be used ({error.strerror}): choose another") from None
    copies.exchange(folder, set(keys))
    return _by_key(_open(folder, show))


def _fill(folder: Path, missing: dict, encoded: Encoded, phase: str, copies: _Mirror, show) -> None:
    """Writes what `encoded` yields for `missing` into shards, each when it is full."""
    entries, done = {}, 0
    with contextlib.closing(encoded):  # so that an interrupt stops its threads too
        for keys, rows in encoded:
            for key, row in zip(keys, rows, strict=True):
                entries[key] = {name: value.cpu().contiguous() for name, value in row.items()}
                done += 1
                if done == len(missing) or _is_full(entries):
                    copies.put(_save(folder, entries, len(missing) - done))
                    entries = {}
            if show:
                show(phase, done, len(missing))


def _is_full(entries: dict[str, dict[str, torch.Tensor]]) -> bool:
    size = sum(value.nbytes for row in entries.values() for value in row.values())
    return len(entries) >= SHARD_ENTRIES or size >= SHARD_BYTES


def _save(folder: Path, entries: dict[str, dict[str, torch.Tensor]], left: int) -> Path:
    """Writes one shard, named after its keys, and returns its path; `left` entries are still to be written."""
    content = save({f"{key}.{name}": value for key, row in entries.items() for name, value in row.items()})
    path = folder / f"{_key('shard', '|'.join(sorted(entries)).encode())}.safetensors"
    try:
        files.replace(path, lambda temporary: temporary.write_bytes(content))
    except OSError as error:
        need = math.ceil(len(content) * (1 + left / len(entries)) / 2**20)
        raise OSError(
            f"the cache folder '{folder}' can't be written ({error.strerror}): it needs {need} MiB or more; make room "
            f"or choose another folder. Finished entries are kept"
        ) from None
    return path


class _Mirror:
    """A second folder of shards. It reports its first error; then the run continues without it."""

    def __init__(self, folder: str | Path | None, show):
        self.folder, self.show = Path(folder) if folder else None, show

    def exchange(self, folder: Path, keys: set[str]) -> None:
        """Copies shards with entries of `keys` between `folder` and the mirror, if only one of the two has them."""
        self._attempt(self._exchange, folder, keys)

    def put(self, path: Path) -> None:
        """Copies one shard into the mirror."""
        self._attempt(lambda folder: files.copy_whole(path, folder / path.parent.name / path.name))

    def _exchange(self, mirror: Path, folder: Path, keys: set[str]) -> None:
        mirrored = mirror / folder.name
        for place in (mirror, mirrored):
            place.mkdir(exist_ok=True)
        ours, theirs = _open(folder, self.show), _open(mirrored, self.show)
        for source, target, known in ((theirs, folder, ours), (ours, mirrored, theirs)):
            lacking = keys - set(_by_key(known))
            for shard in source:
                if lacking & shard.keys:
                    files.copy_whole(shard.path, target / shard.path.name)
                    lacking -= shard.keys

    def _attempt(self, action, *arguments) -> None:
        if self.folder is None:
            return
        try:
            action(self.folder, *arguments)
        except OSError as error:
            reason = error.strerror or error
            note(self.show, f"no copy of the cache is kept in '{self.folder}' ({reason}); the run continues")
            self.folder = None
