"""The ways to compute a micro-batch, and the fallback to the next one when the GPU runs out of memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .. import step
from ..progress import note
from . import gpu, lean


@dataclass(frozen=True)
class Rung:
    """One way to compute a recipe's micro-batches: how it saves memory, and how it gains speed."""

    batch: int  # pictures in a micro-batch; a step has as many micro-batches as the recipe's pictures need
    recompute: int = 0  # how many of `lean.units` are recomputed in the backward pass (gradient checkpointing)
    weights: str = "resident"  # where the transformer blocks' frozen weights are: resident (GPU), host, int8 or nf4
    lean: bool = True  # the lean step; False: the plain one, under autocast
    compiled: bool = False  # element-wise work fused by torch.compile, channels last
    graphed: bool = False  # a micro-step's kernels recorded and replayed as one CUDA graph

    def describe(self) -> str:
        """The rung in a few words."""
        words = [f"micro-batch {self.batch}", f"{self.recompute} layers recomputed" if self.recompute else ""]
        words.append("" if self.weights == "resident" else f"frozen weights: {self.weights}")
        return ", ".join(word for word in words if word)


def make_engine(unet, parameters, rung: Rung):
    """The engine that computes micro-batches as `rung` says: the plain step (`step.Plain`) or the lean one."""
    return lean.Lean(unet, parameters, rung) if rung.lean else step.Plain(unet, parameters, rung.recompute > 0)


class Fallback:
    """The engine in use, and the `rungs` that can replace it in order: each needs less memory than the one before.

    Raises RuntimeError if none fits.
    """

    def __init__(self, unet, parameters, rungs: list[Rung], show=None):
        self.unet, self.parameters, self.rungs, self.show = unet, parameters, list(rungs), show
        self.engine: Any = None
        self._set_up(1, None)

    @property
    def rung(self) -> Rung:
        """The rung in use."""
        return self.rungs[0]

    def run(self, compute: Callable, step: int):
        """Returns `compute()`, repeated with less memory each time the GPU runs out; `step` counts updates from 1.

        At first the engine releases what it holds between micro-batches; after that the next rung takes over.
        """
        released = False
        while True:
            try:
                return compute()
            except (RuntimeError, MemoryError) as error:
                if not gpu.is_out_of_memory(error):
                    raise
                reason = _first_sentence(error)
            released = not released and self.engine.release()  # outside of `except`, which keeps the failed pass alive
            gpu.free()
            if not released:  # there was nothing to release, or it was not enough
                self._step_down(step, reason)

    def _step_down(self, step: int, reason: str) -> None:
        self.engine = None  # so that two engines never hold copies of the weights at once
        self.rungs.pop(0)
        self._set_up(step, reason)
        note(self.show, f"the GPU's memory is full in step {step}: the run continues with {self.rung.describe()}")

    def _set_up(self, step: int, reason: str | None) -> None:
        """Creates the engine of the first rung that fits; drops the rungs before it."""
        while self.engine is None:
            gpu.free()
            if not self.rungs:
                text = (
                    f"step {step} does not fit in the GPU's memory ({reason}): close other programs that use the GPU, "
                    f"or choose a `recipe` with a lower resolution. What is trained is saved: run it again to continue"
                )
                raise RuntimeError(_of_the_host(text) if _on_host(reason) else text)
            try:
                self.engine = make_engine(self.unet, self.parameters, self.rung)
            except (RuntimeError, MemoryError) as error:
                if not gpu.is_out_of_memory(error):
                    raise
                reason = _first_sentence(error)
                self.rungs.pop(0)
        gpu.free()


def _first_sentence(error: Exception) -> str:
    return str(error).split(". ")[0].split("\n")[0] or type(error).__name__


def _of_the_host(text: str) -> str:
    return text.replace("the GPU's memory", "this machine's memory").replace(" that use the GPU", "")


def _on_host(reason: str | None) -> bool:
    return any(word in (reason or "") for word in (*gpu.HOST_FULL, "MemoryError"))
