"""The memory plan: a ladder of ways to compute a recipe's steps, and the first one that fits the card.

Every rung has the same effective batch. "Recomputed" layers use gradient checkpointing. Times are modelled: FLOPs at
the rates that a T4 sustains (see `tests/benchmarks/t4.py`), scaled to the card. They only rank the rungs and say
whether compiling pays.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from .. import models
from . import predict
from .fallback import Rung
from .gpu import GIB, Card

MARGIN = 0.04  # share of a prediction that stays free
ROOM = 0.9  # share of the limit that a micro-batch larger than the recipe's may take
SAVING = 0.1  # share of the time that a larger micro-batch must save
STEP_DOWN = 0.92  # after an out-of-memory error the next rung may take this share of what was predicted
LINEAR, CONVOLUTION, ATTENTION, BANDWIDTH = 22e12, 12e12, 9e12, 240e9  # a T4's FLOP/s and bytes/s (modelled)
TRAFFIC = 5  # how often a step moves the kept bytes outside of matrix products
LAUNCHES, EAGER = 0.012, 0.27  # a micro-batch's least seconds, with and without a CUDA graph (H200)
PINNED = 1.4  # torch rounds pinned memory up to powers of two: this factor on SDXL's weights
BUS = 12e9  # bytes/s from pinned host memory, PCIe 3
PER_PROCESSOR = {70: 2.0, 75: 1.0, 80: 2.8, 86: 1.0, 89: 1.5, 90: 5.7}  # speed / T4's: H200 measured, else data sheets
COMPILED = 0.81  # share of the GPU work that is left (H200)
COMPILE_SECONDS, COMPILE_CORE_SECONDS = 40.0, 270.0  # 57 s measured on 16 cores at 1024 px; on 2, 175 s are assumed
SHAPES = 9  # different picture shapes in a recipe with buckets, assumed
CHECKPOINTING = "time: gradient checkpointing"  # what recomputed layers cost


@dataclass(frozen=True)
class Row:
    """A rung in words, what it costs, and the memory and time that it needs."""

    what: str
    costs: str
    rung: Rung
    parts: predict.Parts
    seconds: float  # of a step, modelled
    host: float = 0.0  # bytes of the host's memory


@dataclass(frozen=True)
class Plan:
    """The ladder and its chosen row."""

    recipe: Any  # a `recipe.Recipe`
    card: Card
    steps_left: int
    limit: float  # bytes that a rung may take
    rows: tuple[Row, ...]
    chosen: Row
    lean: bool = True

    @property
    def rung(self) -> Rung:
        """The chosen row's rung, compiled if the steps left pay for that (it takes no more memory)."""
        able = self.card.cuda and self.card.triton and self.lean
        pays = able and break_even(self.chosen.rung, self.recipe, self.card)[0] < self.steps_left
        return replace(self.chosen.rung, compiled=pays)

    @property
    def rungs(self) -> list[Rung]:
        """The chosen rung and its fallbacks, each for when the one before runs out of memory."""
        below = self.next()
        return [self.rung, *(below.rungs if below else [])]

    def next(self) -> Plan | None:
        """The plan one rung down, for after an out-of-memory error; None if there is none."""
        if not self.card.cuda:
            return None
        limit = STEP_DOWN * self.chosen.parts.reserved
        return _choose(self.recipe, self.card, self.steps_left, limit, self.lean)

    def sentence(self) -> str:
        """The chosen rung in words."""
        row, rung = self.chosen, self.rung
        if not self.card.cuda:
            return f"On the CPU: {row.what}, about {row.parts.reserved / GIB:.1f} GiB of memory."
        costs = "no gradient checkpointing" if row.costs == "nothing" else f"costs {row.costs}"
        text = (
            f"{self.card.name}, {self.card.free / GIB:.1f} GiB free. Memory plan: {row.what} ({costs}), about "
            f"{row.parts.reserved / GIB:.1f} GiB; batch {rung.batch} x "
            f"accumulation {self.recipe.pictures_per_step // rung.batch}"
        )
        return f"{text}; {self._compiling()}."

    def _compiling(self) -> str:
        if not (self.rung.lean and self.card.triton):
            return "not compiled (torch.compile needs Triton)" if self.rung.lean else "the plain step"
        after, takes = break_even(self.rung, self.recipe, self.card)
        kind = "measured on 16 cores" if self.card.cores >= 16 else "assumed"
        verb = "compiled" if self.rung.compiled else "not compiled"
        return (
            f"{verb}: compiling takes about {takes:.0f} s ({kind}) and pays after {after:.0f} steps (modelled); "
            f"{self.steps_left} steps are left"
        )


def here(recipe, steps_left: int | None = None, lean: bool = True) -> Plan:
    """`plan` for the device that `recipe` would run on now, by default for all its steps; on a CPU for the plain step.

    Raises RuntimeError.
    """
    card = Card.here(models.device_for(recipe.precision))
    return plan(recipe, card, recipe.steps if steps_left is None else steps_left, lean and card.cuda)


def plan(recipe, card: Card, steps_left: int, lean: bool = True) -> Plan:
    """The ladder for `recipe` on `card`, from the U-Net's configuration only; `lean` False: for the plain step.

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
            f"recipe '{recipe.name}' needs at least {needed / GIB:.1f} GiB of GPU memory, and {card.name} has "
            f"{card.free / GIB:.1f} GiB free: close other programs that use the GPU, choose a `recipe` with a "
            f"resolution below {recipe.resolution} px, or use a card with {(needed + least.context) / GIB:.1f} GiB"
        )
    return found


def _choose(recipe, card: Card, steps_left: int, limit: float, lean: bool) -> Plan | None:
    rows = ladder(recipe, card, limit, lean)
    chosen = next((row for row in rows if fits(row, limit, card)), None)
    return None if chosen is None else Plan(recipe, card, steps_left, limit, tuple(rows), chosen, lean)


def fits(row: Row, limit: float, card: Card) -> bool:
    """Whether the row takes at most `limit` bytes of the card, and its offloaded weights fit in the host's memory."""
    return row.parts.reserved <= limit and row.host <= card.host_free


def ladder(recipe, card: Card, limit: float, lean: bool = True) -> list[Row]:
    """The rungs from the fastest to the smallest; `limit` (bytes) decides how many layers are recomputed."""

    def row(what: str, costs: str, **settings) -> Row:
        return _row(what, costs, Rung(lean=lean, **settings), recipe, card)

    units, batch = predict.shape_of(recipe).units, recipe.batch
    whole = row("nothing recomputed", "nothing", batch=batch)
    rows = [*_larger(row, whole, recipe, limit), whole]
    less = min(limit, STEP_DOWN * whole.parts.reserved)
    if lean and (count := _fewest(row, less, units, batch=batch)) < units:
        rows.append(row(f"{count} of {units} layers recomputed", CHECKPOINTING, batch=batch, recompute=count))
    every = f"all {units} layers recomputed"
    rows.append(row(every, CHECKPOINTING, batch=batch, recompute=units))
    smaller = [size for size in _divisors(recipe.pictures_per_step) if size < batch]
    if smaller:
        rows.append(_first(
            (row(f"{every}, {_at_once(size)}", "time", batch=size, recompute=units) for size in smaller), limit
        ))  # fmt: skip
    kinds = {
        "host": ("frozen weights in the host's memory", "time: each use copies them to the GPU"),
        "int8": ("frozen weights in 8 bits", "accuracy and some time"),
        "nf4": ("frozen weights in 4 bits", "accuracy and some time"),
    }
    for weights, (what, costs) in kinds.items() if lean else ():
        rows.append(_first(_packed(row, what, costs, weights, units, [batch, *smaller], limit), limit))
    return rows


def _packed(row, what: str, costs: str, weights: str, units: int, sizes: list[int], limit: float):
    """Rows of one way to store the weights: largest micro-batch first, each with the fewest layers recomputed."""
    for size in sizes:
        count = _fewest(row, limit, units, batch=size, weights=weights)
        more = f", {count} of {units} layers recomputed" if count else ""
        more += f", {_at_once(size)}" if size < sizes[0] else ""
        yield row(what + more, costs, batch=size, recompute=count, weights=weights)


def _first(rows, limit: float) -> Row:
    """The first row that fits, or the last."""
    for found in rows:
        if found.parts.reserved <= limit:
            break
    return found


def _fewest(row, limit: float, units: int, **settings) -> int:
    """The smallest number of recomputed layers that fits `limit` bytes; all of them if none fits."""
    low, high = 0, units
    while low < high:
        middle = (low + high) // 2
        if row("", "", recompute=middle, **settings).parts.reserved <= limit:
            high = middle
        else:
            low = middle + 1
    return low


def _larger(row, whole: Row, recipe, limit: float) -> list[Row]:
    """The row with the largest micro-batch that fits with room to spare and saves enough time, if there is one."""
    sizes = [size for size in _divisors(recipe.pictures_per_step) if size > recipe.batch]
    rows = (row(f"nothing recomputed, {_at_once(size)}", "nothing", batch=size) for size in sizes)
    faster = (each for each in rows if each.seconds < (1 - SAVING) * whole.seconds)
    return [each for each in faster if each.parts.reserved <= ROOM * limit][:1]


def _at_once(size: int) -> str:
    return f"{size} picture{'s' if size > 1 else ''} at once"


def _divisors(count: int) -> list[int]:
    """The divisors of `count`, the largest first."""
    return [size for size in range(count, 0, -1) if count % size == 0]


def _row(what: str, costs: str, rung: Rung, recipe, card: Card) -> Row:
    can_record = rung.weights != "host" and not recipe.buckets  # no copies from the host, and one shape
    rung = replace(rung, graphed=card.cuda and rung.lean and can_record)
    shape = predict.shape_of(recipe)
    size = models.DTYPES[recipe.precision].itemsize
    host = PINNED * shape.linear * size if rung.weights == "host" else 0
    return Row(what, costs, rung, predict.predict(shape, rung, recipe, card.cuda), seconds(rung, recipe, card), host)


def break_even(rung: Rung, recipe, card: Card) -> tuple[float, float]:
    """Steps after which compiled kernels have saved the time that compiling took; that time in seconds."""
    takes = (COMPILE_SECONDS + COMPILE_CORE_SECONDS / card.cores) * (SHAPES if recipe.buckets else 1)
    plain, fast = (seconds(replace(rung, compiled=each), recipe, card) for each in (False, True))
    return takes / (plain - fast) if plain > fast else float("inf"), takes


def seconds(rung: Rung, recipe, card: Card) -> float:
    """Seconds of a step, modelled."""
    shape, size = predict.shape_of(recipe), models.DTYPES[recipe.precision].itemsize
    speed = _speed(card)
    work = picture_seconds(shape, rung.recompute, recipe.rank, size) * (1 if rung.lean else 1.3) / speed
    work *= rung.batch * (COMPILED if rung.compiled else 1)
    passes = 2 + (rung.recompute > 0)  # of the frozen weights in a micro-batch
    if rung.weights == "host":
        work += passes * shape.linear * size / BUS
    elif rung.weights != "resident":
        work += passes * shape.linear * (predict.stored(rung.weights, size) + size) / (BANDWIDTH * speed)
    read = 2 * shape.numbers * size / (BANDWIDTH * speed)  # a lower bound: both passes read the weights
    micro = work + max(read, LAUNCHES) if rung.graphed else max(work + read, EAGER)
    return micro * recipe.pictures_per_step / rung.batch


def picture_seconds(shape: predict.Shape, recompute: int, rank: int, size: int) -> float:
    """Seconds of a T4's work on one picture, forward and backward; the first `recompute` units run forward twice."""
    total = 0.0
    for layer in shape.layers:
        linear, convolution, attention = _flops(layer)
        forward = linear / LINEAR + convolution / CONVOLUTION + attention / ATTENTION
        total += forward if layer.place is not None and layer.place < recompute else 0
        total += forward + (0 if layer.first else forward + 1.5 * attention / ATTENTION)
        total += TRAFFIC * predict.cost(layer, 1, rank, size).kept * size / BANDWIDTH
    return total


def _flops(layer: predict.Layer) -> tuple[float, float, float]:
    """FLOPs of a layer's forward pass on one picture: in linear layers, convolutions and attention."""
    rows, width, out = layer.rows, layer.width, layer.out
    if layer.kind == "resnet":
        return 0, 2 * 9 * rows * out * (width + out), 0
    if layer.kind == "block":
        keys = rows + predict.TOKENS
        return 2 * rows * 18 * width**2, 0, 4 * rows * keys * width
    return (4 * rows * width**2 if layer.kind == "transformer" else 0), 0, 0


def _speed(card: Card) -> float:
    """The card's speed as a multiple of a T4's, by its compute capability and its number of multiprocessors."""
    known = [kind for kind in PER_PROCESSOR if kind <= max(card.sm, min(PER_PROCESSOR))]
    return max(card.processors, 1) / 40 * PER_PROCESSOR[max(known)]
