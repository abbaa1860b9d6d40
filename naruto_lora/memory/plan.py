"""The memory plan: a ladder of ways to compute a recipe's steps, and the first that fits the card.

Every rung has the same effective batch. Times are modelled: FLOPs at the rates that a T4 sustains (see
`tests/benchmarks/t4.py`), scaled by the card's kind; they rank the rungs and say whether compiling pays, no more.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .. import models
from . import predict
from .fallback import Rung
from .gpu import GIB, Card

MARGIN = 0.04  # of a prediction, kept free
ROOM = 0.9  # of the card, for a micro-batch that is larger than the recipe's
PAYS = 0.1  # share of the time that a larger micro-batch must save
STEP_DOWN = 0.92  # of a prediction that did not fit after all: what the next rung may take
LINEAR, CONVOLUTION, ATTENTION, BANDWIDTH = 22e12, 12e12, 9e12, 240e9  # a T4's FLOP/s and bytes/s (modelled)
TRAFFIC = 5  # times that the kept bytes are moved outside of matrix products in a step
LAUNCHES, EAGER = 0.012, 0.27  # seconds a micro-batch, however small: graphed and not (H200)
PINNED = 1.4  # torch rounds pinned memory up to powers of two: so many times SDXL's weights
BUS = 12e9  # bytes/s from pinned host memory, PCIe 3
PER_PROCESSOR = {70: 2.0, 75: 1.0, 80: 2.8, 86: 1.0, 89: 1.5, 90: 5.7}  # times a T4's: H200 measured, else data sheets
COMPILED = 0.81  # of the GPU work is left (H200)
COMPILE_SECONDS, COMPILE_CORE_SECONDS = 40.0, 270.0  # 57 s measured on 16 cores at 1024 px; on 2, 175 s are assumed
SHAPES = 9  # of pictures, assumed, where a recipe has buckets


@dataclass(frozen=True)
class Row:
    """A rung, what it gives up, and what it takes."""

    what: str
    gives_up: str
    rung: Rung
    parts: predict.Parts
    seconds: float  # a step, modelled
    host: float = 0.0  # bytes of the host's memory that it takes


@dataclass(frozen=True)
class Plan:
    """The ladder and its chosen row."""

    recipe: object
    card: Card
    steps_left: int
    limit: float  # bytes that a rung may take
    rows: tuple[Row, ...]
    chosen: Row
    lean: bool = True

    @property
    def rung(self) -> Rung:
        """The chosen row's, compiled if so many steps pay for that (which takes no more memory)."""
        able = self.card.cuda and self.card.triton and self.lean
        pays = able and break_even(self.chosen.rung, self.recipe, self.card)[0] < self.steps_left
        return replace(self.chosen.rung, compiled=pays)

    @property
    def rungs(self) -> list[Rung]:
        """The chosen one and those below it, each for when the one before runs out of memory all the same."""
        below = self.next()
        return [self.rung, *(below.rungs if below else [])]

    def next(self) -> Plan | None:
        """After an out-of-memory error: the plan one rung down, None if there is none."""
        if not self.card.cuda:
            return None
        limit = STEP_DOWN * self.chosen.parts.reserved
        return _choose(self.recipe, self.card, self.steps_left, limit, self.lean)

    def sentence(self) -> str:
        """What is chosen, in plain words."""
        row, rung = self.chosen, self.rung
        if not self.card.cuda:
            return f"On the CPU: {row.what}, about {row.parts.reserved / GIB:.1f} GiB of memory."
        what = row.what if row.gives_up == "nothing" else f"{row.what} (costs {row.gives_up})"
        text = (
            f"{self.card.name}, {self.card.free / GIB:.1f} GiB free: {what}, about {row.parts.reserved / GIB:.1f} "
            f"GiB; {rung.batch} x {self.recipe.pictures_per_step // rung.batch} pictures a step"
        )
        return f"{text}; {self._compiling()}."

    def _compiling(self) -> str:
        if not (self.rung.lean and self.card.triton):
            return "not compiled (torch.compile's Triton is not here)" if self.rung.lean else "the plain step"
        after, takes = break_even(self.rung, self.recipe, self.card)
        kind = "measured on 16 cores" if self.card.cores >= 16 else "assumed"
        verb = "compiled" if self.rung.compiled else "not compiled"
        return (
            f"{verb}: compiling takes about {takes:.0f} s ({kind}) and pays after {after:.0f} steps (modelled), "
            f"and {self.steps_left} are left"
        )


def here(recipe, steps_left: int | None = None, lean: bool = True) -> Plan:
    """`plan` for the device that `recipe` would run on now, by default for all its steps; on a CPU the plain step's.

    Raises RuntimeError.
    """
    card = Card.here(models.device_for(recipe.precision))
    return plan(recipe, card, recipe.steps if steps_left is None else steps_left, lean and card.cuda)


def plan(recipe, card: Card, steps_left: int, lean: bool = True) -> Plan:
    """The ladder for `recipe` on `card`, from the U-Net's configuration alone; `lean` False has the plain step's.

    Raises RuntimeError if no rung fits.
    """
    if not card.cuda:
        rung = Rung(recipe.batch, lean=lean)
        row = _row("nothing recomputed", "nothing", rung, recipe, card)
        return Plan(recipe, card, steps_left, card.free, (row,), row, lean)
    found = _choose(recipe, card, steps_left, card.free / (1 + MARGIN), lean)
    if found is None:
        least = min(ladder(recipe, card, 0, lean), key=lambda row: row.parts.reserved).parts
        needed = (1 + MARGIN) * least.reserved
        raise RuntimeError(
            f"recipe '{recipe.name}' needs {needed / GIB:.1f} GiB of GPU memory at the least, and {card.name} has "
            f"{card.free / GIB:.1f} free: end what else uses the card, lower the resolution ({recipe.resolution}), "
            f"or take a card with {(needed + least.context) / GIB:.1f} GiB"
        )
    return found


def _choose(recipe, card: Card, steps_left: int, limit: float, lean: bool) -> Plan | None:
    rows = ladder(recipe, card, limit, lean)
    chosen = next((row for row in rows if fits(row, limit, card)), None)
    return chosen and Plan(recipe, card, steps_left, limit, tuple(rows), chosen, lean)


def fits(row: Row, limit: float, card: Card) -> bool:
    """Whether the row takes at most `limit` bytes of the card, and its offloaded weights fit the host."""
    return row.parts.reserved <= limit and row.host <= card.host_free


def ladder(recipe, card: Card, limit: float, lean: bool = True) -> list[Row]:
    """The rungs from the fastest to the smallest; `limit` bytes say how much is recomputed where that can be chosen."""

    def row(what: str, gives_up: str, **settings) -> Row:
        return _row(what, gives_up, Rung(lean=lean, **settings), recipe, card)

    units, batch = predict.shape_of(recipe).units, recipe.batch
    whole = row("nothing recomputed", "nothing", batch=batch)
    rows = [*_larger(row, whole, recipe, limit), whole]
    less = min(limit, STEP_DOWN * whole.parts.reserved)
    if lean and (count := _fewest(row, less, units, batch=batch)) < units:
        rows.append(row(f"{count} of {units} layers recomputed", "time", batch=batch, recompute=count))
    every = f"all {units} layers recomputed"
    rows.append(row(every, "time", batch=batch, recompute=units))
    smaller = [size for size in _divisors(recipe.pictures_per_step) if size < batch]
    if smaller:
        rows.append(_first(
            (row(f"{every}, {_at_once(size)}", "time", batch=size, recompute=units) for size in smaller), limit
        ))  # fmt: skip
    kinds = {
        "host": ("frozen weights in the host's memory", "time, as they cross the bus at each use"),
        "int8": ("frozen weights in 8 bits", "exactness, and some time"),
        "nf4": ("frozen weights in 4 bits", "exactness, and some time"),
    }
    for weights, (what, gives_up) in kinds.items() if lean else ():
        rows.append(_first(_packed(row, what, gives_up, weights, units, [batch, *smaller], limit), limit))
    return rows


def _packed(row, what: str, gives_up: str, weights: str, units: int, sizes: list[int], limit: float):
    """Rows of one way to keep the weights: the largest micro-batch first, with the least recomputed that fits."""
    for size in sizes:
        count = _fewest(row, limit, units, batch=size, weights=weights)
        more = f", {count} of {units} layers recomputed" if count else ""
        more += f", {_at_once(size)}" if size < sizes[0] else ""
        yield row(what + more, gives_up, batch=size, recompute=count, weights=weights)


def _first(rows, limit: float) -> Row:
    """The first that fits, or the last."""
    for each in rows:
        if each.parts.reserved <= limit:
            break
    return each


def _fewest(row, limit: float, units: int, **settings) -> int:
    """The fewest recomputed layers that fit `limit` bytes; all, if none do."""
    low, high = 0, units
    while low < high:
        middle = (low + high) // 2
        if row("", "", recompute=middle, **settings).parts.reserved <= limit:
            high = middle
        else:
            low = middle + 1
    return low


def _larger(row, whole: Row, recipe, limit: float) -> list[Row]:
    """The row with the largest micro-batch that fits with room to spare, if it saves enough time."""
    sizes = [size for size in _divisors(recipe.pictures_per_step) if size > recipe.batch]
    rows = (row(f"nothing recomputed, {_at_once(size)}", "nothing", batch=size) for size in sizes)
    paying = (each for each in rows if each.seconds < (1 - PAYS) * whole.seconds)
    return [each for each in paying if each.parts.reserved <= ROOM * limit][:1]


def _at_once(size: int) -> str:
    return f"{size} picture{'s' if size > 1 else ''} at once"


def _divisors(count: int) -> list[int]:
    """Of `count`, the largest first."""
    return [size for size in range(count, 0, -1) if count % size == 0]


def _row(what: str, gives_up: str, rung: Rung, recipe, card: Card) -> Row:
    whole = rung.weights != "host" and not recipe.buckets  # one shape, and nothing that is copied in between
    rung = replace(rung, graphed=card.cuda and rung.lean and whole)
    shape = predict.shape_of(recipe)
    size = models.DTYPES[recipe.precision].itemsize
    host = PINNED * shape.linear * size if rung.weights == "host" else 0
    return Row(what, gives_up, rung, predict.predict(shape, rung, recipe, card.cuda), seconds(rung, recipe, card), host)


def break_even(rung: Rung, recipe, card: Card) -> tuple[float, float]:
    """Steps after which compiled kernels have saved the time that it took to compile them; that time in seconds."""
    takes = (COMPILE_SECONDS + COMPILE_CORE_SECONDS / card.cores) * (SHAPES if recipe.buckets else 1)
    plain, fast = (seconds(replace(rung, compiled=each), recipe, card) for each in (False, True))
    return takes / (plain - fast) if plain > fast else float("inf"), takes


def seconds(rung: Rung, recipe, card: Card) -> float:
    """Of a step, modelled."""
    shape, size = predict.shape_of(recipe), models.DTYPES[recipe.precision].itemsize
    speed = _speed(card)
    work = picture_seconds(shape, rung.recompute, recipe.rank, size) * (1 if rung.lean else 1.3) / speed
    work *= rung.batch * (COMPILED if rung.compiled else 1)
    passes = 2 + (rung.recompute > 0)  # of the frozen weights in a micro-batch
    if rung.weights == "host":
        work += passes * shape.linear * size / BUS
    elif rung.weights != "resident":
        work += passes * shape.linear * (predict.stored(rung.weights, size) + size) / (BANDWIDTH * speed)
    read = 2 * shape.numbers * size / (BANDWIDTH * speed)  # at the least
    micro = work + max(read, LAUNCHES) if rung.graphed else max(work + read, EAGER)
    return micro * recipe.pictures_per_step / rung.batch


def picture_seconds(shape: predict.Shape, recompute: int, rank: int, size: int) -> float:
    """Of a T4's work on one picture, forward and backward, with the first `recompute` units' forward pass twice."""
    total = 0.0
    for layer in shape.layers:
        linear, convolution, attention = _flops(layer)
        forward = linear / LINEAR + convolution / CONVOLUTION + attention / ATTENTION
        total += forward if layer.place is not None and layer.place < recompute else 0
        total += forward + (0 if layer.first else forward + 1.5 * attention / ATTENTION)
        total += TRAFFIC * predict.cost(layer, 1, rank, size).kept * size / BANDWIDTH
    return total


def _flops(layer: predict.Layer) -> tuple[float, float, float]:
    """A layer's forward pass on one picture in linear layers, convolutions and attention."""
    rows, width, out = layer.rows, layer.width, layer.out
    if layer.kind == "resnet":
        return 0, 2 * 9 * rows * out * (width + out), 0
    if layer.kind == "block":
        keys = rows + predict.TOKENS
        return 2 * rows * 18 * width**2, 0, 4 * rows * keys * width
    return (4 * rows * width**2 if layer.kind == "transformer" else 0), 0, 0


def _speed(card: Card) -> float:
    """The card's in T4s, by its kind and its number of multiprocessors."""
    known = [kind for kind in PER_PROCESSOR if kind <= max(card.sm, min(PER_PROCESSOR))]
    return max(card.processors, 1) / 40 * PER_PROCESSOR[max(known)]
