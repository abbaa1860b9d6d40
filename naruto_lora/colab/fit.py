"""What a form leaves open, and a person's own pictures decide: crop and number of steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from .. import recipe as recipes
from ..reading import amount, shape
from . import storage


def fitted(recipe, examples: list, crop: str = "auto", steps: int = 0, legs: str = "", folder: Path | None = None,
           mirror: Path | None = None):  # fmt: skip
    """(`recipe` fitted to `examples`, sentences on how), by the form's `crop`, `steps` and `legs`.

    A recipe of this project with its own pictures stays as it is, unless the form says otherwise. With others, `crop`
    "auto" goes by their shapes (`reading.shape`), and the recipe's end by their number (`reading.amount`), unless the
    form has `legs` or more `steps`. A run that is found in `folder` or `mirror` keeps what it began with. Raises
    ValueError for an unknown `crop`.
    """
    state = storage.begun(recipe, folder, mirror) if folder else None
    known = recipes.RECIPES.get(recipe.name)
    own = known is not None and known.dataset == recipe.dataset
    if crop == "auto" and (state or own):
        crop = "buckets" if (state["recipe"]["buckets"] if state else recipe.buckets) else "square"
    recipe, said = shape.fit(recipe, [example.size() for example in examples], crop)
    if own or known is None or legs.strip():
        return recipe, [said]
    count = round(len(examples) * (1 - recipe.holdout))
    wanted = amount.steps_for(count, recipe.steps)
    ends = amount.until([leg.until for leg in recipe.legs], wanted)
    shorter = recipe.replace(legs=tuple(replace(leg, until=end) for leg, end in zip(recipe.legs, ends, strict=True)))
    done = state["step"] if state else 0
    if max(done, steps) > wanted or any(recipe.learning_rate(k) != shorter.learning_rate(k) for k in range(done)):
        return recipe, [said]  # asked for, or begun for the whole recipe
    if steps:
        return shorter, [said]
    return shorter, [said, amount.sentence(count, wanted, recipe.pictures_per_step, recipe.steps)]
