"""How many steps a set of pictures asks for: a rule of thumb, and what it rests on."""

from __future__ import annotations

import math

OWN = 1184  # pictures that the naruto recipes train on: 1,221 less the 3% that are held out
LEAST = 20  # steps


def steps_for(pictures: int, own_steps: int, own_pictures: int = OWN) -> int:
    """The steps for `pictures` in training, by a recipe of `own_steps` that was made for `own_pictures`.

    Steps go with the square root of the pictures. Two simple rules are both wrong for a set of another size. As many
    steps as the recipe has show each of 30 pictures some 200 times at 8 a step: they are memorised. As many times seen
    as in the recipe (5 times: 765 steps of 8 for 1,184 pictures) are 19 steps for 30 pictures: nothing is learnt. The
    square root is half-way between (the geometric mean): 122 steps, each picture seen 32 times. Guides of others
    agree with it within a factor of two: 15 to 20 times for some 80 pictures and 5 to 10 for many (lora-scripts'
    defaults), 10 to 20 and more below 500, 5 to 15 up to 3,000, 3 to 10 above (guides for kohya's scripts); here 20
    times at 80, 8 at 500 and 5 at 1,184.

    Our own curves support the direction, not the exponent. On the small world (`tests/benchmarks/amount.py`, one seed,
    constant rate, 8 a step) the hold-out loss was lowest at step 135 for 15 pictures and rose after it, at 450 for 53
    (flat from 330 on), and for 199 at 630, fifteen steps before that run was stopped, so that its lowest point is not
    known. Best steps grew faster than the square root there, and this rule (86, 162 and 314 by 765) ends before all
    three: it is cautious. Nothing was measured on SDXL itself. Watch the hold-out loss, and stop where it rises.
    """
    return max(LEAST, round(own_steps * math.sqrt(pictures / own_pictures)))


def until(ends: list[int], steps: int) -> list[int]:
    """The ends of a recipe's legs, stretched or shortened so that the last is `steps`; each keeps a step at least."""
    scaled = [max(k, round(end * steps / ends[-1])) for k, end in enumerate(ends, 1)]
    return [min(end, steps - (len(ends) - k)) for k, end in enumerate(scaled, 1)]


def sentence(pictures: int, steps: int, per_step: int, own_steps: int) -> str:
    """Why so many steps, in words; `per_step` is the number of pictures in a step."""
    times = steps / math.ceil(pictures / per_step)
    return (
        f"{steps} steps for {pictures:,} pictures, each seen {times:.0f} times (the recipe's {own_steps} are for "
        f"{OWN:,}); to choose yourself, set `steps`"
    )
