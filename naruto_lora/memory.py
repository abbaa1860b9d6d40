"""Memory: what to give up for it, how much is free, and giving it back."""

from __future__ import annotations

import gc
import sys

import torch

GIB = 2**30
# Full-size SDXL, rank 16, fp16 under autocast, 1024 px batch 1: peak measured on an H200 (README, 'Full size')
PEAK_WITHOUT_RECOMPUTE = 12.4 * GIB
WEIGHTS = 4.8 * GIB


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


def available(device: torch.device) -> int:
    """Bytes that can still be taken on a GPU: free ones and those in PyTorch's cache, within the process's cap."""
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    cap = int(total * torch.cuda.get_per_process_memory_fraction(device)) - reserved
    return min(free, cap) + reserved - torch.cuda.memory_allocated(device)


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
