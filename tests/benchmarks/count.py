"""The T4 model of one micro-step at full size, counted without any GPU: FLOPs, bytes and modelled milliseconds.

    PYTHONPATH=. python tests/benchmarks/count.py

SDXL's layers run on fake tensors, which have shapes and no content; each op is reckoned as t4.py does one of a trace.
So tricks can be ranked on a laptop, but for those of torch.compile (what it fuses, a trace of a GPU shows). Autocast is
the CPU's here, which leaves norms in fp16 that CUDA takes to fp32: the rows with autocast are a little too low.
"""

import argparse
from collections import Counter

import sdxl
import t4
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from naruto_lora import lora, step
from naruto_lora.memory import lean
from naruto_lora.memory.fallback import Rung

NAMES = {torch.float16: "c10::Half", torch.float32: "float", torch.int64: "long int", torch.bool: "bool"}
NO_KERNEL = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "_unsafe_view")
SHAPES = {"naruto-1024": (1, 1024), "naruto-256": (12, 256)}  # pictures a micro-step, px


class Recorded(TorchDispatchMode):
    """Notes every op that would launch kernels, as a trace has it."""

    def __init__(self):
        super().__init__()
        self.ops: list[t4.Op] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name, returns = function._schema.name, function._schema.returns
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        tensors = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        if tensors and not view and name.split("::")[1] not in NO_KERNEL:
            given = [*args, *(kwargs or {}).values()]
            if name in ("aten::_to_copy", "aten::clone"):
                name, given = "aten::copy_", [tensors[0], args[0]]
            self.ops.append(_op(name, given))
        return out


def _op(name: str, given: list) -> t4.Op:
    shapes, sizes, concrete = [], [], []
    for value in given:
        several = isinstance(value, (list, tuple)) and any(isinstance(v, torch.Tensor) for v in value)
        one = value if isinstance(value, torch.Tensor) else value[0] if several else None
        shape = tuple(tuple(v.shape) for v in value) if several else tuple(one.shape) if one is not None else ()
        shapes.append(shape)
        sizes.append(one.element_size() if one is not None else 0)
        concrete.append("" if one is not None or value is None else str(value))
    return t4.Op(name, tuple(shapes), tuple(sizes), tuple(concrete), (False,) * len(shapes), 0.0, 1)


def fake(module, dtype=torch.float16):
    """`module`, made on the meta device, with fake weights: trainable ones in fp32."""
    for part in module.modules():
        for name, value in list(part._parameters.items()):
            if value is not None:
                kind = torch.float32 if value.requires_grad else dtype
                weight = torch.empty(value.shape, dtype=kind)
                part._parameters[name] = torch.nn.Parameter(weight, requires_grad=value.requires_grad)
        for name, value in list(part._buffers.items()):
            part._buffers[name] = None if value is None else torch.empty(value.shape, dtype=value.dtype)
    return module


def attention(query, key, value, *_, **__):
    """The memory-efficient kernel, the one that a T4 has; fake tensors of a CPU would take another."""
    return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, None, query.requires_grad)[0]


def micro_step(rung: Rung, batch: int, side: int) -> list[t4.Op]:
    """Forward and backward of the U-Net with LoRA of rank 16, inputs already encoded."""
    with torch.device("meta"):
        unet = sdxl.unet().eval().requires_grad_(False)
        lora.inject(unet, 16, 16)
    with FakeTensorMode():
        fake(unet)
        trained = [p for p in unet.parameters() if p.requires_grad]
        engine = lean.Lean(unet, trained, rung) if rung.lean else step.Plain(unet, trained, rung.recompute > 0)
        latents = torch.empty(batch, 4, side // 8, side // 8)
        inputs = {
            "latents": latents, "noise": latents, "prompt_embeds": torch.empty(batch, 77, 2048, dtype=torch.float16),
            "pooled": torch.empty(batch, 1280, dtype=torch.float16), "time_ids": torch.empty(batch, 6),
            "timesteps": torch.empty(batch, dtype=torch.int64), "alphas_cumprod": torch.empty(1000),
        }  # fmt: skip
        with Recorded() as recorded:
            engine.accumulate(inputs, torch.empty(batch))
    return recorded.ops


def encoding(batch: int, side: int, dtype: torch.dtype) -> list[t4.Op]:
    """The VAE's encoder, as the stock script runs it at each micro-step."""
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        vae = AutoencoderKL(**sdxl.VAE).eval().requires_grad_(False)
    with FakeTensorMode(), torch.no_grad():
        fake(vae, dtype)
        with Recorded() as recorded:
            vae.encoder(torch.empty(batch, 3, side, side, dtype=dtype))
    return recorded.ops


def report(name: str, found: list[t4.Op], batch: int) -> None:
    ms, work = Counter(), Counter()
    for op in found:
        kind, took = t4.modelled(op)
        ms[kind] += took
        work[kind] += t4.flops(op)[1] / 1e12
    kinds = " / ".join(f"{ms[kind]:.0f}" for kind in (*t4.RATES, "other"))
    volume = sum(map(t4.moved, found)) / 1e9
    row = f"{sum(work.values()):8.2f}{volume:8.1f}{len(found):8}{ms.total():8.0f}{ms.total() / batch:8.0f}  {kinds}"
    print(f"{name:46}{row}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    options = parser.parse_args()
    torch.nn.functional.scaled_dot_product_attention = attention
    for recipe in options.recipes:
        batch, side = SHAPES[recipe]
        plain = Rung(batch, lean=False)
        headings = "".join(f"{heading:>8}" for heading in ("TFLOP", "GB", "ops", "T4 ms", "a pict."))
        print(f"{recipe:46}{headings}  linear / conv / attention / other")
        once = micro_step(Rung(batch, lean=False, recompute=1), batch, side)
        report("stock script (text encoders left out)", once + encoding(batch, side, torch.float32), batch)
        report("the same, VAE in fp16", once + encoding(batch, side, torch.float16), batch)
        report("encoded once", once, batch)
        report("nothing recomputed", micro_step(plain, batch, side), batch)
        report("lean step", micro_step(Rung(batch), batch, side), batch)


if __name__ == "__main__":
    main()
