"""The settings of a run: a frozen `Recipe`, its learning rate at each step, and the named recipes."""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from . import call_as

SCHEDULES, PRECISIONS = ("constant", "cosine"), ("fp16", "fp32")
BOUNDS: dict[str, tuple] = {  # a field's type, its least and its largest value; `steps` is a form's
    "resolution": (int, 8, 4096), "buckets": (bool, 0, 1), "flip": (bool, 0, 1), "batch": (int, 1, 4096),
    "accumulation": (int, 1, 4096), "rank": (int, 1, 2048), "alpha": (float, 1e-6, 10**6), "seed": (int, 0, 2**64 - 1),
    "caption_dropout": (float, 0, 0.99), "holdout": (float, 0, 0.99), "previews": (int, 0, 1000),
    "save_every": (int, 1, 10**7), "measure_every": (int, 1, 10**7), "save_minutes": (float, 0, 10**6),
    "max_minutes": (float, 0, 10**6), "until": (int, 1, 10**7), "lr": (float, 1e-12, 10**6), "steps": (int, 1, 10**7),
}  # fmt: skip
NAME_BYTES = 200  # a file's name can have 255: the rest is for '.safetensors' and a temporary suffix


@dataclass(frozen=True)
class Leg:
    """A part of training: up to step `until` (counted from the run's start) at `lr`.

    `cosine` falls from `lr` at the leg's first step towards 0 at the leg's end.
    """

    until: int  # updates
    lr: float
    schedule: str = "constant"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a run learns. One update sees `batch * accumulation` pictures."""

    name: str
    legs: tuple[Leg, ...]
    resolution: int = 1024  # px: the side of a square; every bucket has about its area
    buckets: bool = False  # crop each picture to the nearest of several aspect ratios, not to a square
    flip: bool = False  # mirror each picture at half of its uses, at random
    batch: int = 1  # pictures per micro-batch
    accumulation: int = 8  # micro-batches per update
    rank: int = 16
    alpha: float = 16.0  # the LoRA is scaled by alpha / rank
    caption_dropout: float = 0.05  # share of captions replaced by zeros, as for an empty prompt; the original: 0
    holdout: float = 0.03  # share of the pictures kept out of training, to measure on
    precision: str = "fp16"  # fp16 needs a CUDA GPU; fp32 runs anywhere
    seed: int = 0
    save_every: int = 30  # updates between checkpoints
    save_minutes: float = 10.0  # and at most so many minutes between them; 0: no such bound
    measure_every: int = 90  # updates between measurements of the hold-out loss (and previews); also first and last
    previews: int = 2  # hold-out captions drawn at each measurement; 0: none
    max_minutes: float = 0.0  # save and stop after so many minutes, to resume later; 0: no bound
    base: str = "stabilityai/stable-diffusion-xl-base-1.0"  # hub id or folder
    vae: str = "madebyollin/sdxl-vae-fp16-fix"  # hub id or folder; "" uses the base's own
    dataset: str = "lambdalabs/naruto-blip-captions"  # hub id, folder or .zip
    expect: str = ""  # its cost in words: minutes, GiB, and where these were measured

    def __post_init__(self):
        if not isinstance(self.legs, (list, tuple)) or not all(isinstance(leg, (Leg, dict)) for leg in self.legs):
            raise ValueError(f"recipe {_short(self.name)}: legs must be a list, such as [{{'until': 300, 'lr': 1e-4}}]")
        legs = tuple(leg if isinstance(leg, Leg) else _make(Leg, leg, "leg") for leg in self.legs)
        object.__setattr__(self, "legs", legs)
        _check(self)

    @property
    def steps(self) -> int:
        """The number of updates."""
        return self.legs[-1].until

    @property
    def pictures_per_step(self) -> int:
        return self.batch * self.accumulation

    def learning_rate(self, step: int) -> float:
        """The learning rate of the update after `step` finished ones (0 <= step < steps)."""
        start = 0
        for leg in self.legs:
            if step < leg.until:
                done = (step - start) / (leg.until - start)
                return leg.lr * (0.5 * (1 + math.cos(math.pi * done)) if leg.schedule == "cosine" else 1.0)
            start = leg.until
        raise ValueError(f"step {step} is past the last leg of recipe '{self.name}', which ends at {self.steps}")

    def replace(self, **changes) -> Recipe:
        """A copy with other values. Raises ValueError for an unknown field, with the nearest name."""
        _check_names(Recipe, changes, "recipe")
        return replace(self, **changes)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    def describe(self, pictures: int | None = None) -> str:
        """The recipe in one line; `pictures` is the size of the training set, for the epochs."""
        seen, epochs = self.steps * self.pictures_per_step, ""
        if pictures:
            count = self.steps / math.ceil(pictures / self.pictures_per_step)  # an epoch sees each picture once
            seen, epochs = round(count * pictures), f", {count:.1f} epochs of {pictures:,}"
        rates = ", then ".join(f"{leg.lr:g} {leg.schedule} to {leg.until}" for leg in self.legs)
        text = (
            f"{self.name}: rank {self.rank} at {self.resolution} px, {self.batch} x {self.accumulation} pictures "
            f"a step, {self.steps} steps = {seen:,} pictures{epochs}; learning rate {rates}"
        )
        return f"{text}. {self.expect}" if self.expect else text


def load(source: str | Path | Recipe, **changes) -> Recipe:
    """A recipe by its name, from a .json or .toml file, or `source` itself; `changes` replace fields.

    Raises ValueError for an unknown name, field or value, FileNotFoundError for a missing file.
    """
    if isinstance(source, Recipe):
        return source.replace(**changes)
    path, names = f"{source}", ", ".join(RECIPES)
    path = os.path.expanduser(path) if _fits(path) else path
    if not path.lower().endswith((".json", ".toml")):
        if path not in RECIPES:
            raise ValueError(f"no recipe is called {_short(path)}; choose one of {names}, or a .json or .toml file")
        return RECIPES[path].replace(**changes)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"the recipe file {_short(path)} does not exist; check it, or choose {names}")
    return _make(Recipe, _parse(path) | changes, "recipe")


def adjust(recipe: Recipe, rank: int = 0, legs: str = "", steps: int = 0, max_minutes: float = 0.0) -> Recipe:
    """`recipe` with the changes of a notebook's form; 0 and '' change nothing. Raises ValueError.

    A new `rank` keeps alpha / rank. `legs` is text such as '300 1e-4, 600 3e-5 cosine'. `steps` ends the recipe early
    so that the whole recipe can resume from there: a cosine leg is never cut, because its rates would change.
    """
    for name, value in (("rank", rank), ("steps", steps), ("max_minutes", max_minutes)):
        if value:
            _check_number(name, value)
    changes: dict = {"max_minutes": max_minutes or recipe.max_minutes}
    if rank:
        changes |= {"rank": rank, "alpha": recipe.alpha * rank / recipe.rank}
    if text := str(legs or "").strip():
        changes["legs"] = tuple(_leg(leg) for leg in text.split(","))
    recipe = recipe.replace(**changes)
    return recipe.replace(legs=_until(recipe.legs, steps)) if steps and steps < recipe.steps else recipe


def _leg(text: str) -> Leg:
    try:
        until, lr, *schedule = text.split()
        return Leg(int(until), float(lr), *schedule)
    except (ValueError, TypeError):
        raise ValueError(f"the leg {_short(text.strip())} must read as '300 1e-4' or '600 3e-5 cosine'") from None


def _until(legs: tuple[Leg, ...], steps: int) -> tuple[Leg, ...]:
    """The legs up to the one with update `steps`, cut there if it is constant."""
    place = next(k for k, leg in enumerate(legs) if leg.until >= steps)
    last = legs[place]
    return (*legs[:place], replace(last, until=steps) if last.schedule == "constant" else last)


def _parse(path: str) -> dict:
    import tomllib

    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        values = json.loads(text) if path.lower().endswith(".json") else tomllib.loads(text)
    except (ValueError, OSError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else f"{error!s:.99}"
        raise ValueError(f"the recipe file {_short(path)} can't be read ({reason}); correct it there") from None
    if not isinstance(values, dict):
        raise ValueError(f"the recipe file {_short(path)} must hold one object with fields such as 'name' and 'legs'")
    return values


def _make(kind: type, values: dict, what: str):
    _check_names(kind, values, what)
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"the {what} is incomplete: {str(error).split('__init__() ')[-1]}") from None


def _check_names(kind: type, values: dict, what: str) -> None:
    names = [f.name for f in fields(kind)]
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1, cutoff=0.5)
            hint = f"did you mean '{near[0]}'?" if near else f"the fields are {', '.join(names)}"
            raise ValueError(f"unknown {what} field {_short(key):.30}: {hint}")


def _check(recipe: Recipe) -> None:
    whose = f"recipe {_short(recipe.name)}: "

    def need(ok: object, sentence: str) -> None:
        if not ok:
            raise ValueError(whose + sentence)

    need(_fits(recipe.name, NAME_BYTES) and re.fullmatch(r"(?!pytorch_lora_weights$)\w[\w .+-]*", recipe.name),
         f"its name can't name a file: choose another name of letters, digits, '-' and '_', at most {NAME_BYTES} bytes")
    for name in ("base", "vae", "dataset"):
        value = str(given) if isinstance(given := getattr(recipe, name), Path) else given
        need(_fits(value) and (value.strip() or name == "vae"),
             f"{name} must be a hub id or a path that is not empty or very long, not {_short(value)}")
        object.__setattr__(recipe, name, os.path.expanduser(value))
    need(_fits(recipe.expect, 4000), f"expect must be a short text, not {_short(recipe.expect)}")
    for name in (field for field in BOUNDS if field in vars(recipe)):
        _check_number(name, getattr(recipe, name), whose)
    need(recipe.resolution % 8 == 0, f"resolution {recipe.resolution} is not divisible by 8: use "
         f"{recipe.resolution // 8 * 8} or {recipe.resolution // 8 * 8 + 8}")
    need(recipe.precision in PRECISIONS, f"precision must be fp16 or fp32, not {_short(recipe.precision)}")
    need(len(recipe.legs) > 0, "it has no legs: add at least one, such as {'until': 300, 'lr': 1e-4}")
    for last, leg in zip([0, *(leg.until for leg in recipe.legs[:-1])], recipe.legs, strict=True):
        for name in ("until", "lr"):
            _check_number(name, getattr(leg, name), f"{whose}a leg's ")
        need(leg.until > last, f"the leg until {leg.until} must end after step {last}: put the legs in order")
        need(leg.schedule in SCHEDULES, f"schedule {_short(leg.schedule)} is unknown: use {' or '.join(SCHEDULES)}")


def _check_number(name: str, value, whose: str = "") -> None:
    """Raises ValueError if `value` is not one for the field `name`; true and false are no numbers."""
    kind, least, largest = BOUNDS[name]
    if isinstance(value, bool) != (kind is bool) or not isinstance(value, (int, kind)) or not least <= value <= largest:
        number = f"number from {least:,} to {largest:,}"
        what = {int: f"a whole {number}", float: f"a {number}", bool: "true or false"}[kind]
        raise ValueError(f"{whose}{name} must be {what}, not {_short(value)}")


def _fits(value, most: int = 255) -> bool:
    """Whether `value` is text, with parts between '/' of at most `most` bytes; no NUL, no half of a letter."""
    text = isinstance(value, str) and not re.search("[\0\ud800-\udfff]", value)
    return text and len(value.encode()) < 4096 and max(len(part.encode()) for part in value.split("/")) <= most


def _short(value) -> str:
    """`value` for a message: on one line, not long, without addresses in memory."""
    try:
        text = re.sub(" at 0x[0-9a-fA-F]+", "", repr(value))
    except (ValueError, RecursionError):  # a number of thousands of digits
        text = f"a huge {type(value).__name__}"
    return text if len(text) < 160 else f"{text[:80]}...{text[-70:]}"


RECIPES = {
    # Of the original's last leg only the name 'final run' is known; we assume one more cosine from 3e-5.
    "naruto-1024": Recipe(
        "naruto-1024", (Leg(300, 1e-4), Leg(600, 3e-5, "cosine"), Leg(765, 3e-5, "cosine")), resolution=1024,
        expect="9.8 GiB on the GPU; 8 minutes on an H200, from one timed step; almost 2 hours on a T4, modelled",
    ),
    "naruto-256": Recipe(
        "naruto-256", (Leg(200, 1e-4),), resolution=256, batch=12,
        expect="9.0 GiB on the GPU; 1.5 minutes on an H200, from one timed step; 17 minutes on a T4, modelled",
    ),
}  # fmt: skip


call_as(__name__, load)
