"""Encode once: captions to prompt_embeds and pooled, pictures to latents, in shards keyed by what made them."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import time
from collections.abc import Iterable, Iterator
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

SHARD_BYTES, SHARD_ENTRIES = 16 * 2**20, 64  # a shard is full at either: some 50 captions or 64 pictures at 1024 px
VAE_NUMBERS = 1024  # the VAE's encoder holds at once, a pixel: 2 GiB for a picture of 1024 px in fp16
ABANDONED = 3600.0  # seconds after which a file that is still being written belongs to no living run


@dataclass(frozen=True)
class Cache:
    """Encoded examples: the keys of their entries in memory-mapped shards, read from disk when asked for."""

    names: tuple[str, ...]  # of the examples, for messages
    shapes: tuple[tuple[int, int, int], ...]  # each latent's (4, h, w)
    latents: tuple[str, ...]  # keys: 32 hex digits each
    mirrored: tuple[str, ...]  # keys of the mirrored pictures; a picture's own where it is never flipped
    prompts: tuple[str, ...]
    shards: dict[str, safe_open] = field(repr=False, compare=False)  # by key

    def part(self, start: int, stop: int) -> Cache:
        """The examples from `start` up to `stop`."""
        columns = (self.names, self.shapes, self.latents, self.mirrored, self.prompts)
        return Cache(*(column[start:stop] for column in columns), self.shards)

    def __len__(self) -> int:
        return len(self.latents)

    def batch(self, indices, latent_noise, dropped: torch.Tensor, flipped: torch.Tensor, device) -> dict:
        """The inputs of `diffusion_loss` for `indices`, whose latents have one shape, on `device`.

        Latents are sampled from the VAE's distribution by `latent_noise`, B times (4, h, w); where `dropped` (B,) the
        caption is zeros, as SDXL's pipeline does for an empty negative prompt; where `flipped` (B,) the picture is
        mirrored.
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
    """Encodes what `folder` lacks, text first, then pictures, each encoder freed after its turn.

    With the recipe's `flip`, pictures are encoded mirrored as well, but for the last `held`, the hold-out.
    `mirror`, a folder whose parent exists (as on Google Drive), gets a copy of each shard and gives back lost ones.
    `show(phase, done, total)` is called after each batch. A killed run goes on: finished shards stay.
    Raises ValueError for an unreadable picture or a latent that is not finite, naming the picture, and OSError for
    a folder that is full or can't be written.
    """
    text_key = f"{models.identity(recipe.base)}|{recipe.precision}"
    vae_key = f"{models.identity(recipe.vae or recipe.base)}|{recipe.precision}|{recipe.resolution}"
    vae_key += "|buckets" if recipe.buckets else ""
    prompts = tuple(_key(text_key, e.caption.encode()) for e in examples)
    latents = tuple(_key(vae_key, e.read()) for e in examples)
    flips = len(examples) - held if recipe.flip else 0
    mirrored = tuple(_key("mirrored", key.encode()) for key in latents[:flips]) + latents[flips:]

    captions = {key: e.caption for key, e in zip(prompts, examples, strict=True)}
    pictures = dict(zip(latents, examples, strict=True))
    pictures |= {key: replace(e, mirrored=True) for key, e in zip(mirrored[:flips], examples[:flips], strict=True)}
    copies = _Mirror(mirror, show)
    shards = {}
    for kind, wanted, encoded in (("captions", captions, _captions), ("pictures", pictures, _pictures)):
        place = Path(folder) / ("prompts" if kind == "captions" else "latents")
        found = _found(place, wanted, copies, show)
        missing = {key: item for key, item in wanted.items() if key not in found}
        if missing:
            _fill(place, missing, encoded(missing, recipe), kind, copies, show)
            gpu.free()
            found = _by_key(_open(place, show))
        shards |= {key: found[key] for key in wanted}
    shapes = tuple(tuple(shards[key].get_slice(f"{key}.mean").get_shape()) for key in latents)
    return Cache(tuple(e.name for e in examples), shapes, latents, mirrored, prompts, shards)


def _key(kind: str, content: bytes) -> str:
    return hashlib.sha256(kind.encode() + b"\0" + content).hexdigest()[:32]


Encoded = Iterator[tuple[list[str], list[dict[str, torch.Tensor]]]]  # keys and tensors, a batch at a time


def _captions(missing: dict[str, str], recipe) -> Encoded:
    device, dtype = models.device_for(recipe.precision), models.DTYPES[recipe.precision]
    encoders = models.load_text_encoders(recipe.base, dtype, device)
    for keys in _parts(list(missing), 16):
        yield keys, encode_prompts(encoders, [missing[key] for key in keys])


def _pictures(missing: dict[str, data.Example], recipe) -> Encoded:
    """Decoded in threads ahead of the VAE; a batch is handed on while the next one is being encoded."""
    device, dtype = models.device_for(recipe.precision), models.DTYPES[recipe.precision]
    vae = models.load_vae(recipe.base, recipe.vae, dtype, device)
    side = recipe.resolution
    sizes: dict[tuple[int, int], list[str]] = {}
    for key, example in missing.items():
        size = picture.bucket(example.size(), side) if recipe.buckets else (side, side)
        sizes.setdefault(size, []).append(key)
    rows = ((missing[key], size) for size, keys in sizes.items() for key in keys)
    parts = [part for keys in sizes.values() for part in _parts(keys, _batch(vae, side))]
    begun = None
    with contextlib.closing(data.decode_ahead(rows)) as decoded:
        for part in parts:
            crops = list(itertools.islice(decoded, len(part)))
            following = part, crops, encode_pictures(vae, crops), _marked(device)
            if begun:
                yield _ended(*begun)
            begun = following
    yield _ended(*begun)


def _batch(vae, side: int) -> int:
    """Pictures of side**2 px that are encoded at once: as many as pay, and as half of the free memory holds."""
    if vae.device.type == "cpu":
        return max(1, min(32, 1024**2 // side**2))
    need = VAE_NUMBERS * vae.dtype.itemsize * side**2
    return max(1, min(32, 4 * 1024**2 // side**2, gpu.available(vae.device) // (2 * need)))


def _marked(device: torch.device):
    """An event behind the work that a GPU has been given so far; None on the CPU, which has done it."""
    if device.type == "cpu":
        return None
    event = torch.cuda.Event()
    event.record()
    return event


def _ended(keys: list[str], crops: list[data.Crop], moments: torch.Tensor, event) -> tuple[list[str], list[dict]]:
    """Keys and entries of a batch, once the device is done with it. Raises ValueError if one is not finite."""
    if event:
        event.synchronize()
    for crop, finite in zip(crops, moments.isfinite().flatten(1).all(1).tolist(), strict=True):
        if not finite:
            raise ValueError(
                f"the VAE gave latents that are not finite for '{crop.name}'; take the fp16-fix VAE or fp32"
            )
    ids = torch.tensor([crop.time_ids for crop in crops], dtype=torch.float32)
    return keys, [{"mean": mean, "std": std, "time_ids": row} for (mean, std), row in zip(moments, ids, strict=True)]


def _parts(rows: list, size: int) -> list[list]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


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
def encode_pictures(vae, crops: list[data.Crop]) -> torch.Tensor:
    """Mean and std (B, 2, 4, h, w) of the latents of crops of one size, scaled for the U-Net, in host memory.

    A GPU may still be at it: synchronize before they are read.
    """
    pinned = vae.device.type == "cuda"  # pages from which the GPU copies by itself, while the host goes on
    stack = torch.empty(len(crops), *crops[0].pixels.shape, dtype=torch.uint8, pin_memory=pinned)
    torch.stack([torch.from_numpy(crop.pixels) for crop in crops], out=stack)
    images = data.unit(stack.to(vae.device, non_blocking=True)).to(vae.dtype)
    posterior = vae.encode(images).latent_dist
    moments = torch.stack([posterior.mean, posterior.std], 1) * vae.config.scaling_factor
    return moments.to("cpu", non_blocking=True)


class _Shard(NamedTuple):
    path: Path
    open: safe_open
    keys: set[str]


def _open(folder: Path, show) -> list[_Shard]:
    """The shards in `folder`, memory-mapped; one that is broken is told of and removed."""
    shards = []
    for path in sorted(folder.glob("*.safetensors")):
        try:
            opened = safe_open(path, "pt")
        except FileNotFoundError:  # another run has found it broken too
            continue
        except SafetensorError as error:
            note(show, f"'{path}' in the cache is broken ({error}): it is removed, its entries are made again")
            path.unlink(missing_ok=True)
            continue
        shards.append(_Shard(path, opened, {name.rpartition(".")[0] for name in opened.keys()}))
    return shards


def _by_key(shards: Iterable[_Shard]) -> dict[str, safe_open]:
    return {key: shard.open for shard in shards for key in shard.keys}


def _found(folder: Path, wanted: Iterable[str], copies: _Mirror, show) -> dict[str, safe_open]:
    """{key: its shard} of what `folder`, which is made, and the mirror hold."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob("*.writing"):
            if time.time() - path.stat().st_mtime > ABANDONED:
                path.unlink()
    except OSError as error:
        raise OSError(f"the cache folder '{folder}' can't be used ({error.strerror}): choose another") from None
    copies.exchange(folder, set(wanted))
    return _by_key(_open(folder, show))


def _fill(folder: Path, missing: dict, encoded: Encoded, phase: str, copies: _Mirror, show) -> None:
    """Writes what `encoded` yields for `missing` into shards, each as soon as it is full."""
    entries, done = {}, 0
    with contextlib.closing(encoded):  # also after an interrupt, which would leave its threads at work
        for keys, rows in encoded:
            for key, row in zip(keys, rows, strict=True):
                entries[key] = {name: value.cpu().contiguous() for name, value in row.items()}
                done += 1
                if done == len(missing) or _full(entries):
                    copies.put(_save(folder, entries, len(missing) - done))
                    entries = {}
            if show:
                show(phase, done, len(missing))


def _full(entries: dict[str, dict[str, torch.Tensor]]) -> bool:
    size = sum(value.nbytes for row in entries.values() for value in row.values())
    return len(entries) >= SHARD_ENTRIES or size >= SHARD_BYTES


def _save(folder: Path, entries: dict[str, dict[str, torch.Tensor]], left: int) -> Path:
    """Writes one shard, named after its keys, and returns its path; `left` entries are to come after it."""
    content = save({f"{key}.{name}": value for key, row in entries.items() for name, value in row.items()})
    path = folder / f"{_key('shard', '|'.join(sorted(entries)).encode())}.safetensors"
    try:
        files.replace(path, lambda temporary: temporary.write_bytes(content))
    except OSError as error:
        need = math.ceil(len(content) * (1 + left / len(entries)) / 2**20)
        raise OSError(
            f"the cache folder '{folder}' can't be written ({error.strerror}): it needs {need} MiB or more, what is "
            f"finished stays; make room or choose another folder"
        ) from None
    return path


class _Mirror:
    """A second folder of shards. The first thing that goes wrong there is told; the run continues without it."""

    def __init__(self, folder: str | Path | None, show):
        self.folder, self.show = Path(folder) if folder else None, show

    def exchange(self, folder: Path, wanted: set[str]) -> None:
        """Copies the shards with `wanted` entries that only one of the two folders has to the other."""
        self._attempt(self._exchange, folder, wanted)

    def put(self, path: Path) -> None:
        """Copies one shard here."""
        self._attempt(lambda: files.copy_whole(path, self.folder / path.parent.name / path.name))

    def _exchange(self, folder: Path, wanted: set[str]) -> None:
        there = self.folder / folder.name
        for place in (self.folder, there):
            place.mkdir(exist_ok=True)
        ours, theirs = _open(folder, self.show), _open(there, self.show)
        for source, target, known in ((theirs, folder, ours), (ours, there, theirs)):
            lacking = wanted - set(_by_key(known))
            for shard in source:
                if lacking & shard.keys:
                    files.copy_whole(shard.path, target / shard.path.name)
                    lacking -= shard.keys

    def _attempt(self, work, *arguments) -> None:
        if self.folder is None:
            return
        try:
            work(*arguments)
        except OSError as error:
            reason = error.strerror or error
            note(self.show, f"no copy of the cache is kept in '{self.folder}' ({reason}); the run continues")
            self.folder = None
