"""Memory: what to give up for it, how much is free, and giving it back."""

from __future__ import annotations

import gc
import sys
from dataclasses import dataclass

import torch

GIB = 2**30
# Full-size SDXL, rank 16, fp16 under autocast, 1024 px batch 1: peak measured on an H200 (README, 'Full size')
PEAK_WITHOUT_RECOMPUTE = 12.4 * GIB
WEIGHTS = 4.8 * GIB


@dataclass(frozen=True)
class Rung:
    """How a recipe's micro-batches are computed: what is given up for memory, and what is spent for speed."""

    batch: int  # pictures a micro-batch; as many micro-batches as the recipe's pictures a step need
    recompute: int = 0  # of the U-Net's `lean.units`: their values are computed again in the backward pass, not kept
    weights: str = "resident"  # how the transformer blocks' frozen weights are kept: resident, host, int8 or nf4
    lean: bool = True  # the lean step; False is the plain one, under autocast
    compiled: bool = False  # element-wise work fused by torch.compile, channels last
    graphed: bool = False  # a micro-step's kernels recorded and replayed as one CUDA graph


def recompute_needed(device: torch.device, resolution: int, batch: int) -> bool:
    """Whether activations must be recomputed in the backward pass (gradient checkpointing) to fit this card.

    Saves 5-7 GiB on full-size SDXL and costs a third more time. Activations grow with the pixels of a
    micro-batch; a tenth of the card is left for other things.
    """
    if device.type != "cuda":
        return False
    share = max(1.0, batch * resolution**2 / 1024**2)
    peak = WEIGHTS + (PEAK_WITHOUT_RECOMPUTE - WEIGHTS) * share
    return peak > 0.9 * torch.cuda.get_device_properties(device).total_memory


def reset_peak() -> None:
    """Starts a new measurement of `peak_gib`."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float | None:
    """GiB of GPU memory allocated at most since `reset_peak`; None without a GPU."""
    return torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else None


def free() -> None:
    """Gives memory back after the last reference is gone: garbage, a kept traceback's tensors, CUDA's cache."""
    for name in ("last_traceback", "last_value", "last_exc"):
        if hasattr(sys, name):
            setattr(sys, name, None)
    if "IPython" in sys.modules and (shell := sys.modules["IPython"].get_ipython()):
        shell.last_execution_result = None  # it and the shell's own traceback keep the failed cell's frames alive
        if hasattr(shell, "InteractiveTB"):
            shell.InteractiveTB.tb = shell.InteractiveTB.etype = shell.InteractiveTB.evalue = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
