"""The GPU: its properties, its free memory, and how to release memory."""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
from dataclasses import dataclass

import torch

GIB = 2**30
HOST_FULL = ("could not create a primitive", "alloc_cpu", "DefaultCPUAllocator", "bad_alloc")  # torch's words
CONTEXT = 0.45 * GIB  # that the CUDA driver and the kernels' code take, outside of torch's allocator


@dataclass(frozen=True)
class Card:
    """The properties of a device that a plan needs; `Card.of` describes a card that is not in this machine."""

    name: str
    free: float  # bytes that torch's allocator can take
    sm: int = 0  # compute capability: 75 is 7.5; 0 is a CPU
    processors: int = 0  # streaming multiprocessors
    host_free: float = 0.0  # bytes of the host's memory
    triton: bool = False  # torch.compile can generate kernels
    cores: int = 1

    @property
    def cuda(self) -> bool:
        return self.sm > 0

    @staticmethod
    def of(name: str, gib: float, sm: int = 75, processors: int = 40, host_gib: float = 11.0, cores: int = 2) -> Card:
        """A card of `gib` GiB that no program uses; what CUDA itself takes is not free."""
        return Card(name, gib * GIB - CONTEXT, sm, processors, host_gib * GIB, True, cores)

    @staticmethod
    def here(device: torch.device) -> Card:
        """The device as it is now: memory is free that neither programs nor live tensors hold, within torch's cap."""
        host, cores = host_free(), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        if device.type != "cuda":
            return Card("CPU", host, host_free=host, cores=cores or 1)
        about, triton = torch.cuda.get_device_properties(device), importlib.util.find_spec("triton") is not None
        sm = about.major * 10 + about.minor
        return Card(about.name, available(device), sm, about.multi_processor_count, host, triton, cores or 1)


def use_expandable_segments() -> None:
    """Turns on the allocator's expandable segments, which leave fewer gaps, unless the user has configured it."""
    if not torch.cuda.is_available() or {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"} & set(os.environ):
        return
    torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


def send(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Copies a CPU tensor to `device`; to a GPU from pinned memory, so that the CPU need not wait for the GPU."""
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def host_free() -> float:
    """Bytes of the host's memory that a new tensor could take."""
    import psutil  # accelerate needs it too

    return psutil.virtual_memory().available


def row(part: str, module: torch.nn.Module) -> dict[str, str]:
    """A table row: the size of a part of SDXL, in parameters and in memory."""
    tensors = [*module.parameters(), *module.buffers()]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    count = sum(parameter.numel() for parameter in module.parameters())
    return {"part": part, "million parameters": f"{count / 1e6:,.1f}", "GiB": f"{size / GIB:.3g}"}


def reset_peak() -> None:
    """Starts a new measurement of `peak_gib`."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float | None:
    """The most GPU memory that was allocated since `reset_peak`, in GiB; None without a GPU."""
    return torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else None


def available(device: torch.device) -> int:
    """Bytes that can still be allocated on a GPU: free ones and those in PyTorch's cache, within the process's cap."""
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    number = torch.cuda.current_device() if device.index is None else device.index
    cap = int(total * torch.cuda.get_per_process_memory_fraction(number)) - reserved
    return min(free, cap) + reserved - torch.cuda.memory_allocated(device)


def is_out_of_memory(error: Exception) -> bool:
    """Whether the GPU or the host ran out of memory: CUDA's and the CPU's libraries report that in many wordings."""
    text, kinds = str(error), (torch.OutOfMemoryError, MemoryError)
    words = ("out of memory", "ALLOC_FAILED", *HOST_FULL)
    return isinstance(error, kinds) or any(word in text for word in words)


def free() -> None:
    """Releases memory that nothing needs: garbage, the tensors that a traceback keeps, CUDA's cache."""
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
