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

SCHEDULES = ("constant", "cosine")
PRECISIONS = ("fp16", "fp32")


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
            raise ValueError(f"recipe '{self.name}': legs must be a list, such as [{{'until': 300, 'lr': 1e-4}}]")
        legs = tuple(leg if isinstance(leg, Leg) else _make(Leg, leg, "leg") for leg in self.legs)
        object.__setattr__(self, "legs", legs)
        for name in ("base", "vae", "dataset"):
            value = getattr(self, name)
            if isinstance(value, (str, Path)):
                object.__setattr__(self, name, os.path.expanduser(value))
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
    path = Path(source)
    if path.suffix not in (".json", ".toml"):
        if source not in RECIPES:
            names = ", ".join(RECIPES)
            raise ValueError(f"no recipe is called '{source}'; choose one of {names}, or a .json or .toml file")
        return RECIPES[source].replace(**changes)
    if not path.is_file():
        raise FileNotFoundError(f"the recipe file '{path}' does not exist; check it, or choose {', '.join(RECIPES)}")
    return _make(Recipe, _parse(path) | changes, "recipe")


def adjust(recipe: Recipe, rank: int = 0, legs: str = "", steps: int = 0, max_minutes: float = 0.0) -> Recipe:
    """`recipe` with the changes of a notebook's form; 0 and '' change nothing. Raises ValueError.

    A new `rank` keeps alpha / rank. `legs` is text such as '300 1e-4, 600 3e-5 cosine'. `steps` ends the recipe early
    so that the whole recipe can resume from there: a cosine leg is never cut, because its rates would change.
    """
    changes: dict = {"max_minutes": max_minutes or recipe.max_minutes}
    if rank:
        changes |= {"rank": rank, "alpha": recipe.alpha * rank / recipe.rank}
    if legs.strip():
        changes["legs"] = tuple(_leg(text) for text in legs.split(","))
    recipe = recipe.replace(**changes)
    return recipe.replace(legs=_until(recipe.legs, steps)) if 0 < steps < recipe.steps else recipe


def _leg(text: str) -> Leg:
    try:
        until, lr, *schedule = text.split()
        return Leg(int(until), float(lr), *schedule)
    except (ValueError, TypeError):
        raise ValueError(f"the leg '{text.strip()}' must read as '300 1e-4' or '600 3e-5 cosine'") from None


def _until(legs: tuple[Leg, ...], steps: int) -> tuple[Leg, ...]:
    """The legs up to the one with update `steps`, cut there if it is constant."""
    place = next(k for k, leg in enumerate(legs) if leg.until >= steps)
    last = legs[place]
    return (*legs[:place], replace(last, until=steps) if last.schedule == "constant" else last)


def _parse(path: Path) -> dict:
    import tomllib

    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (ValueError, OSError) as error:
        raise ValueError(f"the recipe file '{path}' can't be read ({error}); correct it there") from None
    if not isinstance(values, dict):
        raise ValueError(f"the recipe file '{path}' must hold one object with fields such as 'name' and 'legs'")
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
            near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
            hint = f"did you mean '{near[0]}'?" if near else f"the fields are {', '.join(names)}"
            raise ValueError(f"unknown {what} field '{key}': {hint}")


def _check(recipe: Recipe) -> None:
    def need(ok: bool, sentence: str) -> None:
        if not ok:
            raise ValueError(f"recipe '{recipe.name}': {sentence}")

    whole = ("resolution", "batch", "accumulation", "rank", "save_every", "measure_every")
    for name in whole:
        value = getattr(recipe, name)
        need(isinstance(value, int) and value > 0, f"{name} must be a whole number above 0, not {value!r}")
    for name in ("seed", "previews"):
        value = getattr(recipe, name)
        need(isinstance(value, int) and value >= 0, f"{name} must be a whole number, 0 or more, not {value!r}")
    for name in ("buckets", "flip"):
        value = getattr(recipe, name)
        need(isinstance(value, bool), f"{name} must be true or false, not {value!r}")
    for name in ("save_minutes", "max_minutes"):
        value = getattr(recipe, name)
        need(isinstance(value, (int, float)) and 0 <= value < math.inf, f"{name} must be 0 or more, not {value!r}")
    for name in ("alpha", "caption_dropout", "holdout"):
        value = getattr(recipe, name)
        need(isinstance(value, (int, float)), f"{name} must be a number, not {value!r}")
    need(recipe.resolution % 8 == 0, f"resolution {recipe.resolution} is not divisible by 8: use "
         f"{max(8, recipe.resolution // 8 * 8)} or {recipe.resolution // 8 * 8 + 8}")
    for name in ("name", "base", "dataset"):
        value = getattr(recipe, name)
        need(isinstance(value, str) and value.strip() != "", f"{name} must be a text that is not empty, not {value!r}")
    need(re.fullmatch(r"\w[\w .+-]*", recipe.name) is not None and recipe.name != "pytorch_lora_weights",
         f"name {recipe.name!r} can't name a file: choose another, of letters, digits, '-' and '_'")
    need(isinstance(recipe.vae, str), f"vae must be a hub id, a folder or '', not {recipe.vae!r}")
    need(0 < recipe.alpha < math.inf, f"alpha must be above 0, not {recipe.alpha}")
    need(0 <= recipe.caption_dropout < 1, f"caption_dropout must be from 0 to below 1, not {recipe.caption_dropout}")
    need(0 <= recipe.holdout < 1, f"holdout must be from 0 to below 1, not {recipe.holdout}")
    need(recipe.precision in PRECISIONS, f"precision must be fp16 or fp32, not '{recipe.precision}'")
    need(len(recipe.legs) > 0, "it has no legs: add at least one, such as {'until': 300, 'lr': 1e-4}")
    last = 0
    for leg in recipe.legs:
        need(isinstance(leg.until, int), f"a leg's until must be a whole number, not {leg.until!r}")
        need(isinstance(leg.lr, (int, float)), f"a leg's lr must be a number, not {leg.lr!r}")
        need(leg.until > last, f"the leg until {leg.until} must end after step {last}: put the legs in order")
        need(0 < leg.lr < math.inf, f"the learning rate of the leg until {leg.until} must be above 0, not {leg.lr}")
        need(leg.schedule in SCHEDULES, f"schedule '{leg.schedule}' is unknown: use {' or '.join(SCHEDULES)}")
        last = leg.until


RECIPES = {
    # Of the original's last leg only the name 'final run' is known; we assume one more cosine from 3e-5.
    "naruto-1024": Recipe(
        "naruto-1024",
        (Leg(300, 1e-4), Leg(600, 3e-5, "cosine"), Leg(765, 3e-5, "cosine")),
        resolution=1024,
        expect="9.8 GiB on the GPU; 8 minutes on an H200, from one timed step; almost 2 hours on a T4, modelled",
    ),
    "naruto-256": Recipe(
        "naruto-256",
        (Leg(200, 1e-4),),
        resolution=256,
        batch=12,
        expect="9.0 GiB on the GPU; 1.5 minutes on an H200, from one timed step; 17 minutes on a T4, modelled",
    ),
}


call_as(__name__, load)
