"""What a T4 would pay for a profiler's trace of another GPU: milliseconds by a model, op by op.

    python tests/benchmarks/t4.py TRACE.json [--steps 2]

The trace is torch.profiler's, with record_shapes. Each op that launched kernels counts as the greater of its FLOPs
at the rate that a T4 sustains and its bytes at the T4's bandwidth; launches cost nothing there. The rates were fitted
to published SD1.5 figures on a T4 and are good to 25%: what comes out is 'modelled', never measured.
"""

import argparse
import bisect
import gzip
import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

RATES = {"linear": 22e12, "conv": 12e12, "attention": 9e12}  # FLOP/s sustained in fp16 (a 70 W card holds no 65)
FP32 = 4.6e12  # FLOP/s in fp32, which has no tensor cores there
BANDWIDTH = 240e9  # bytes/s
CARD_BANDWIDTH = 4e12  # bytes/s of the H200 that was traced, for kernels of which the trace names no op
SIZES = {"double": 8, "long int": 8, "long": 8, "int": 4, "float": 4, "c10::Half": 2, "c10::BFloat16": 2}
MATMULS = {  # name: places of the two factors
    "mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "addmm_": (1, 2), "_addmm_activation": (1, 2),
    "baddbmm": (1, 2), "baddbmm_": (1, 2), "linear": (0, 1), "_int_mm": (0, 1),
}  # fmt: skip
REDUCTIONS = {"sum", "mean", "linalg_vector_norm", "_foreach_norm", "mse_loss", "amax", "any", "all", "isfinite"}
WRITES = {"copy_", "fill_", "zero_", "normal_", "uniform_", "random_"}  # in place, without reading what was there


@dataclass(frozen=True)
class Op:
    """An op of the trace with the kernels that it launched itself."""

    name: str
    shapes: tuple  # of each argument; () for what is no tensor, several in one for a list of tensors
    sizes: tuple[int, ...]  # bytes of an element of each argument; 0 for what is no tensor
    concrete: tuple[str, ...]  # the other arguments, as text
    twice: tuple[bool, ...]  # arguments that are read and written
    ms: float  # of its kernels, on the card that was traced
    launches: int

    @property
    def bare(self) -> str:
        return self.name.split("::")[-1]

    def tensors(self) -> list[tuple[tuple[int, ...], int]]:
        """(shape, bytes of an element) of each tensor argument; of each in a list."""
        found = []
        for shape, size in zip(self.shapes, self.sizes, strict=True):
            if size:
                found += [(tuple(s), size) for s in shape] if _nested(shape) else [(tuple(shape), size)]
        return found


def read(file: Path) -> dict:
    opened = gzip.open if Path(file).suffix == ".gz" else open
    with opened(file, "rt", encoding="utf-8") as handle:
        return json.load(handle)


def ops(trace: dict) -> list[Op]:
    """The ops that launched kernels, each with their time; none in a trace of a CPU."""
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    called = {e["args"].get("External id"): e for e in events if e.get("cat") == "cpu_op"}
    kernels = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    around = _around(events)
    times, launches = Counter(), Counter()
    for kernel in kernels:
        number = kernel["args"].get("External id")
        number = number if number in called else around(kernel["args"].get("correlation"))
        times[number] += kernel["dur"]
        launches[number] += kernel["cat"] == "kernel"
    nameless = {"name": "?", "args": {}}
    return [_op(called.get(number, nameless), times[number], launches[number]) for number in times]


def _around(events: list[dict]):
    """A function from a launch's correlation to the External id of the innermost op around it, or None."""
    launches = {e["args"].get("correlation"): e for e in events if e.get("cat") in ("cuda_runtime", "cuda_driver")}
    threads: dict[int, list[dict]] = {}
    for event in sorted((e for e in events if e.get("cat") == "cpu_op"), key=lambda e: (e["ts"], -e["dur"])):
        threads.setdefault(event["tid"], []).append(event)

    def around(correlation) -> int | None:
        launch = launches.get(correlation)
        row = threads.get(launch["tid"], []) if launch else []
        place = bisect.bisect_right(row, launch["ts"], key=lambda e: e["ts"]) if row else 0
        while place and row[place - 1]["ts"] + row[place - 1]["dur"] < launch["ts"]:
            place -= 1
        return row[place - 1]["args"].get("External id") if place else None

    return around


def _op(event: dict, microseconds: float, launches: int) -> Op:
    arguments = event["args"]
    shapes, kinds = arguments.get("Input Dims", []), arguments.get("Input type", [])
    sizes = [_size(kind) for kind in kinds][: len(shapes)] + [0] * (len(shapes) - len(kinds))
    largest = max(sizes, default=2) or 2
    sizes = [largest if _nested(shape) else size for shape, size in zip(shapes, sizes, strict=True)]
    names = _parameters(arguments.get("kernel_file"), event["name"])
    twice = [name.startswith("in_out") for name in names[: len(shapes)]]
    twice += [False] * (len(shapes) - len(twice))
    concrete = arguments.get("Concrete Inputs", [""] * len(shapes))
    return Op(event["name"], tuple(map(_frozen, shapes)), tuple(sizes), tuple(concrete), tuple(twice),
              microseconds / 1000, launches)


def _size(kind: str) -> int:
    if kind in ("", "Scalar", "ScalarList", "TensorList", "GenericList") or kind not in SIZES:
        return 1 if kind in ("bool", "unsigned char", "signed char") else 0
    return SIZES[kind]


def _nested(shape) -> bool:
    return bool(shape) and not isinstance(shape[0], int)


def _frozen(shape):
    return tuple(map(_frozen, shape)) if isinstance(shape, list) else shape


def _parameters(file: str | None, name: str) -> list[str]:
    """The names of a Triton kernel's arguments, from Inductor's file of it; none where it can't be read."""
    if not file or not Path(file).is_file():
        return []
    found = re.search(rf"def {re.escape(name)}\(([^)]*)\)", Path(file).read_text(encoding="utf-8"))
    return [part.split(":")[0].strip() for part in found[1].split(",")] if found else []


def flops(op: Op) -> tuple[str, float]:
    """(linear, conv, attention or other; floating-point operations, two a multiplication and addition)."""
    if op.bare in MATMULS and op.name.startswith("aten::"):
        a, b = (op.shapes[place] for place in MATMULS[op.bare])
        return "linear", 2 * math.prod(a) * (b[0] if op.bare == "linear" else b[-1])
    if "convolution_backward" in op.bare:
        out, _, weight = op.shapes[:3]
        return "conv", 2 * math.prod(out) * math.prod(weight[1:]) * sum(_wanted(op))
    if op.bare.endswith("convolution"):
        return "conv", 2 * math.prod(_convolved(op)) * math.prod(op.shapes[1][1:])
    if "attention" in op.bare:
        backward = op.bare.endswith("backward")
        query, key = op.shapes[backward : backward + 2]
        heads_first = op.bare.startswith("_scaled_dot_product")  # (B, H, N, D), else (B, N, H, D)
        keys = key[2] if heads_first else key[1]
        return "attention", (10 if backward else 4) * math.prod(query) * keys
    return "other", 0.0


def _wanted(op: Op) -> list[bool]:
    """Whether a convolution's backward computes the gradient of its input and of its weight."""
    mask = next((text for text in reversed(op.concrete) if "True" in text or "False" in text), "[True, False, False]")
    return [part.strip(" []") == "True" for part in mask.split(",")[:2]]


def _convolved(op: Op) -> tuple[int, ...]:
    """A convolution's output shape (N, O, h, w)."""
    (count, _, *sides), (outputs, _, *kernel) = op.shapes[:2]
    lists = [json.loads(text) for text in op.concrete[2:] if text.startswith("[")]
    stride, padding, dilation = lists[:3]
    if op.bare.startswith(("cudnn", "mkldnn", "miopen")):
        stride, padding = padding, stride
    wide = [(n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(sides, kernel, stride, padding, dilation, strict=True)]  # fmt: skip
    return count, outputs, *wide


def moved(op: Op) -> float:
    """Bytes read and written, each tensor once."""
    tensors = op.tensors()
    if not tensors:
        return 0.0
    volumes = [math.prod(shape) * size for shape, size in tensors]
    total, largest, first = sum(volumes), max(volumes), volumes[0]
    if op.name.startswith("triton_") or not op.name.startswith("aten::"):
        return total + sum(math.prod(shape) * size for shape, size, again
                           in zip(op.shapes, op.sizes, op.twice, strict=True) if again)  # fmt: skip
    if op.bare in MATMULS:
        factors = [op.shapes[place] for place in MATMULS[op.bare]]
        size = op.sizes[MATMULS[op.bare][0]]
        out = flops(op)[1] / 2 / factors[0][-1]
        added = first if MATMULS[op.bare][0] else 0
        return (sum(map(math.prod, factors)) + out) * size + added
    if "convolution_backward" in op.bare:
        return total + sum(v for v, wanted in zip(volumes[1:3], _wanted(op), strict=True) if wanted)
    if flops(op)[0] == "conv":
        return total + math.prod(_convolved(op)) * tensors[0][1]
    if "attention" in op.bare:
        return total + (sum(volumes[1:4]) if "backward" in op.bare else first)
    if op.bare in ("embedding", "index", "index_select", "gather"):
        return 2 * math.prod(tensors[-1][0]) * tensors[0][0][-1] * tensors[0][1]
    if op.bare in REDUCTIONS or op.bare in WRITES:
        return total
    if op.bare.endswith("_"):
        return total + (total if op.bare.startswith("_foreach") else first)
    if op.bare == "cat":
        return 2 * total
    if op.bare.startswith("upsample"):
        return total * (1.25 if "backward" in op.bare else 5)  # to twice the side
    return total + largest


def modelled(op: Op) -> tuple[str, float]:
    """(kind, milliseconds on a T4)."""
    kind, work = flops(op)
    volume = moved(op)
    if not volume:
        return "unknown", op.ms * CARD_BANDWIDTH / BANDWIDTH
    place = MATMULS.get(op.bare, (0,))[0]
    rate = FP32 if op.sizes[place] >= 4 else RATES.get(kind, math.inf)
    return kind, 1000 * max(work / rate, volume / BANDWIDTH)


def summary(trace: dict, steps: int = 1) -> dict:
    """What one of the `steps` in the trace takes: GPU work and modelled T4 time in ms, kernels, TFLOP, GB."""
    found = ops(trace)
    by_kind, work = Counter(), Counter()
    for op in found:
        kind, ms = modelled(op)
        by_kind[kind] += ms / steps
        work[flops(op)[0]] += flops(op)[1] / steps
    return {
        "gpu_ms": sum(op.ms for op in found) / steps,
        "launches": sum(op.launches for op in found) / steps,
        "t4_ms": sum(by_kind.values()),
        "t4_ms_by_kind": dict(by_kind),
        "unknown_gpu_ms": sum(op.ms for op in found if not moved(op)) / steps,
        "tflop": sum(work.values()) / 1e12,
        "tflop_by_kind": {kind: value / 1e12 for kind, value in work.items()},
        "gigabytes": sum(map(moved, found)) / steps / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("trace", type=Path)
    parser.add_argument("--steps", type=int, default=1, help="micro-steps in the trace")
    parser.add_argument("--top", type=int, default=25, help="ops to list")
    options = parser.parse_args()
    trace = read(options.trace)
    print(json.dumps(summary(trace, options.steps), indent=1))
    rows: dict[str, list] = {}
    for op in ops(trace):
        row = rows.setdefault(op.name, [0.0, 0.0, 0, 0.0])
        for place, value in enumerate((modelled(op)[1], op.ms, op.launches, moved(op) / 1e9)):
            row[place] += value / options.steps
    print(f"{'modelled T4 ms':>15}{'GPU ms':>10}{'launches':>10}{'GB':>8}  op")
    for name, (t4_ms, ms, launches, volume) in sorted(rows.items(), key=lambda item: -item[1][0])[: options.top]:
        print(f"{t4_ms:15.2f}{ms:10.2f}{launches:10.0f}{volume:8.2f}  {name[:80]}")


if __name__ == "__main__":
    main()
