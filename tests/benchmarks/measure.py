"""What the benchmarks measure with: attention as on a T4 or as the card has it, seconds, memory, kernels."""

import contextlib
import subprocess
import time
from pathlib import Path

import t4
import torch

from naruto_lora.memory import gpu

T4_LIKE, OWN = "T4-like", "own"


def attention(mode: str) -> None:
    """T4-like: of PyTorch's attention kernels only those that a T4 can run, and no TF32. Own: as the card comes."""
    like_t4 = mode == T4_LIKE
    torch.backends.cuda.enable_flash_sdp(not like_t4)
    torch.backends.cuda.enable_cudnn_sdp(not like_t4)
    torch.backends.cudnn.allow_tf32 = not like_t4  # for matrix products it is off as PyTorch comes
    torch.backends.cudnn.benchmark = False


def now() -> float:
    """Seconds, once the GPU has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peaks() -> dict[str, float | None]:
    """GiB since `memory.reset_peak`, by PyTorch's allocator: in tensors, and taken from the card."""
    if not torch.cuda.is_available():
        return {"allocated_gib": None, "reserved_gib": None}
    return {"allocated_gib": gpu.peak_gib(), "reserved_gib": torch.cuda.max_memory_reserved() / gpu.GIB}


@contextlib.contextmanager
def kernels(trace: Path, steps: int, figures: dict):
    """Traces what is done meanwhile, `steps` micro-steps; puts GPU work, launches and modelled T4 time in `figures`."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    now()
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        yield
        now()
    trace.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(trace))
    if torch.cuda.is_available():
        figures.update(t4.summary(t4.read(trace), steps))


def machine() -> dict[str, str]:
    """What stands beside each figure."""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"device": card, "torch": torch.__version__}


def commit() -> str:
    """Where the working tree stands, or nothing where git doesn't know it."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""
