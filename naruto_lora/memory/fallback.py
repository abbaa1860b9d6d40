"""The ways to compute a micro-batch, and the fall back from one to the next when the GPU's memory is full."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .. import step
from ..progress import note
from . import gpu, lean


@dataclass(frozen=True)
class Rung:
    """One way to compute a recipe's micro-batches: what is given up for memory, and what is spent for speed."""

    batch: int  # pictures a micro-batch; as many micro-batches as the recipe's pictures a step need
    recompute: int = 0  # of the U-Net's `lean.units`: their activations are recomputed in the backward pass, not kept
    weights: str = "resident"  # where the transformer blocks' frozen weights are: resident, host, int8 or nf4
    lean: bool = True  # the lean step; False is the plain one, under autocast
    compiled: bool = False  # element-wise work fused by torch.compile, channels last
    graphed: bool = False  # a micro-step's kernels recorded and replayed as one CUDA graph

    def say(self) -> str:
        """In a few words."""
        words = [f"{self.batch} at once", f"{self.recompute} layers recomputed" if self.recompute else ""]
        words.append("" if self.weights == "resident" else f"frozen weights: {self.weights}")
        return ", ".join(word for word in words if word)


def make_engine(unet, parameters, rung: Rung):
    """What computes the micro-batches as `rung` says: the plain step (`step.Plain`) or the lean one."""
    return lean.Lean(unet, parameters, rung) if rung.lean else step.Plain(unet, parameters, rung.recompute > 0)


class Fallback:
    """The engine in use, and what replaces it: `rungs` in their order, each taking less memory than the one before.

    Raises RuntimeError if none fits.
    """

    def __init__(self, unet, parameters, rungs: list[Rung], show=None):
        self.unet, self.parameters, self.rungs, self.show = unet, parameters, list(rungs), show
        self.engine = None
        self._set_up(1, None)

    @property
    def rung(self) -> Rung:
        """The way in use."""
        return self.rungs[0]

    def run(self, compute: Callable, step: int):
        """`compute()`, repeated with less memory each time the GPU runs out; `step` is the update's number, from 1.

        First the engine releases what it holds between micro-batches, then the next rung takes over.
        """
        released = False
        while True:
            try:
                return compute()
            except RuntimeError as error:
                if not gpu.is_full(error):
                    raise
                reason = _first_sentence(error)
            released = not released and self.engine.release()  # outside of `except`, which keeps the failed pass alive
            gpu.free()
            if not released:  # or it was not enough
                self._step_down(step, reason)

    def _step_down(self, step: int, reason: str) -> None:
        self.engine = None  # else its copies of the weights would stand beside the next one's
        self.rungs.pop(0)
        self._set_up(step, reason)
        note(self.show, f"the GPU's memory is full in step {step}: the run continues with {self.rung.say()}")

    def _set_up(self, step: int, reason: str | None) -> None:
        """Makes the engine of the first rung that fits; drops those before it."""
        while self.engine is None:
            gpu.free()
            if not self.rungs:
                raise RuntimeError(
                    f"step {step} does not fit in the GPU's memory ({reason}): close other programs that use the GPU, "
                    f"or choose a smaller resolution; what is trained is saved, run it again to continue"
                )
            try:
                self.engine = make_engine(self.unet, self.parameters, self.rung)
            except RuntimeError as error:
                if not gpu.is_full(error):
                    raise
                reason = _first_sentence(error)
                self.rungs.pop(0)
        gpu.free()


def _first_sentence(error: Exception) -> str:
    return str(error).split(". ")[0]
