"""What the benchmarks calculate: a T4's modelled time, and the README's tables from the results."""

import math

import pytest
import torch
from benchmarks import ladder, t4

from naruto_lora import lora, models

HALF, FLOAT = "c10::Half", "float"


def op(name, *arguments, ms=1.0, **extra):
    """An op as in the profiler's trace; arguments are (shape, dtype) or text."""
    tensors = [a if isinstance(a, tuple) else ([], "Scalar") for a in arguments]
    event = {"name": name, "args": {
        "External id": 7, "Input Dims": [shape for shape, _ in tensors], "Input type": [kind for _, kind in tensors],
        "Concrete Inputs": [a if isinstance(a, str) else "" for a in arguments],
    } | extra, "ph": "X", "cat": "cpu_op", "tid": 1, "ts": 0, "dur": 9}  # fmt: skip
    kernel = {"ph": "X", "cat": "kernel", "dur": 1000 * ms, "args": {"External id": 7}}
    (found,) = t4.ops({"traceEvents": [event, kernel]})
    return found


def half(*shape):
    return list(shape), HALF


FOUR = (half(2, 5, 3, 8),) * 2 + (half(2, 7, 3, 8),) * 2  # gradient and query of 5, key and value of 7
CONVOLUTION = (half(2, 4, 9, 9), half(6, 4, 3, 3))
GOING_BACK = (half(2, 6, 5, 5), *CONVOLUTION, "[0]", "[2, 2]", "[1, 1]", "[1, 1]", "False", "[0, 0]", "1")


@pytest.mark.parametrize(
    "found, kind, work, volume",
    [
        (op("aten::mm", half(3, 5), half(5, 7)), "linear", 2 * 3 * 5 * 7, 2 * (15 + 35 + 21)),
        (op("aten::mm", half(3, 5), half(5, 7), half(3, 7)), "linear", 2 * 3 * 5 * 7, 2 * (15 + 35 + 21)),
        (op("aten::addmm", half(7), half(3, 5), half(5, 7)), "linear", 2 * 3 * 5 * 7, 2 * (7 + 15 + 35 + 21)),
        (op("aten::addmm_", half(3, 7), half(3, 5), half(5, 7)), "linear", 2 * 3 * 5 * 7, 2 * (42 + 15 + 35)),
        (op("aten::bmm", half(2, 3, 5), half(2, 5, 7)), "linear", 2 * 2 * 3 * 5 * 7, 2 * 2 * (15 + 35 + 21)),
        (op("aten::cudnn_convolution", *CONVOLUTION, "[1, 1]", "[2, 2]", "[1, 1]", "1"), "conv",
         2 * (2 * 6 * 5 * 5) * 4 * 9, 2 * (2 * 4 * 81 + 6 * 4 * 9 + 2 * 6 * 25)),
        (op("aten::convolution_backward", *GOING_BACK, "[True, False, False]"), "conv",
         2 * (2 * 6 * 5 * 5) * 4 * 9, 2 * (2 * 6 * 25 + 2 * 4 * 81 + 6 * 4 * 9 + 2 * 4 * 81)),
        (op("aten::convolution_backward", *GOING_BACK, "[True, True, False]"), "conv",
         4 * (2 * 6 * 5 * 5) * 4 * 9, 2 * (2 * 6 * 25 + 2 * (2 * 4 * 81 + 6 * 4 * 9))),
        (op("aten::_efficient_attention_forward", *FOUR[1:]), "attention",
         4 * 2 * 3 * 5 * 7 * 8, 2 * 2 * 3 * 8 * (5 + 7 + 7 + 5)),
        (op("aten::_efficient_attention_backward", *FOUR), "attention",
         10 * 2 * 3 * 5 * 7 * 8, 2 * 2 * 3 * 8 * (5 + 5 + 7 + 7 + 5 + 7 + 7)),
        (op("aten::add", half(2, 6), half(2, 6)), "other", 0, 3 * 24),
        (op("aten::mul_", half(2, 6), half(6)), "other", 0, 24 + 12 + 24),
        (op("aten::copy_", ([2, 6], FLOAT), half(2, 6)), "other", 0, 48 + 24),
        (op("aten::sum", half(2, 6), ""), "other", 0, 24),
        (op("aten::cat", ([[2, 3], [2, 5]], "TensorList"), "1"), "other", 0, 2 * 2 * 16),
        (op("triton_poi_fused_add_0", half(2, 6), half(2, 6), "12"), "other", 0, 48),
    ],
)  # fmt: skip
def test_flops_and_bytes_by_hand(found, kind, work, volume):
    assert t4.flops(found) == (kind, work)
    assert t4.moved(found) == volume


def test_a_triton_kernel_that_writes_in_place_moves_the_tensor_twice(tmp_path):
    file = tmp_path / "kernel.py"
    file.write_text("@jit\ndef triton_poi_0(in_out_ptr0, in_ptr0, xnumel, XBLOCK : tl.constexpr):\n    pass\n")
    found = op("triton_poi_0", half(2, 6), half(6), "12", **{"kernel_file": str(file)})
    assert t4.moved(found) == 24 + 12 + 24


def test_an_op_takes_the_longer_of_its_arithmetic_and_its_memory_traffic():
    large, thin = op("aten::mm", half(4096, 4096), half(4096, 4096)), op("aten::mm", half(4096, 4096), half(4096, 16))
    exact = op("aten::mm", ([4096, 4096], FLOAT), ([4096, 4096], FLOAT))
    assert t4.modelled(large) == ("linear", pytest.approx(1000 * 2 * 4096**3 / t4.RATES["linear"]))
    assert t4.modelled(thin) == ("linear", pytest.approx(1000 * t4.moved(thin) / t4.BANDWIDTH))
    assert t4.modelled(exact) == ("linear", pytest.approx(1000 * 2 * 4096**3 / t4.FP32))


def test_a_kernel_without_an_op_belongs_to_the_innermost_op_around_its_launch():
    called = [
        {"ph": "X", "cat": "cpu_op", "name": name, "tid": 1, "ts": ts, "dur": dur, "args": {
            "External id": number, "Input Dims": [[4]], "Input type": [HALF], "Concrete Inputs": [""]}}
        for number, (name, ts, dur) in enumerate([("outer", 0, 100), ("aten::neg", 10, 5), ("aten::exp", 20, 9)])
    ]  # fmt: skip
    launch = {"ph": "X", "cat": "cuda_runtime", "tid": 1, "ts": 25, "dur": 2, "args": {"correlation": 8}}
    kernel = {"ph": "X", "cat": "kernel", "dur": 1, "args": {"correlation": 8}}
    (found,) = t4.ops({"traceEvents": [*called, launch, kernel]})
    assert found.name == "aten::exp"


def test_kernels_of_unknown_ops_count_by_their_time():
    kernels = [{"ph": "X", "cat": "kernel", "dur": 3000, "args": {"External id": 9}}] * 2
    figures = t4.summary({"traceEvents": kernels}, steps=2)
    assert (figures["gpu_ms"], figures["launches"], figures["unknown_gpu_ms"]) == (3, 1, 3)
    assert figures["t4_ms"] == pytest.approx(3 * t4.CARD_BANDWIDTH / t4.BANDWIDTH)


def test_a_real_steps_flops_equal_pytorchs_count(base, encoded, tmp_path):
    """The U-Net with LoRA, forward and backward, on the CPU; each op that multiplies gets a kernel in the trace."""
    from torch.utils.flop_counter import FlopCounterMode

    unet = models.load_unet(base, torch.float32, torch.device("cpu"))
    lora.inject(unet, rank=4, alpha=4)
    inputs = encoded.batch([0, 1], torch.zeros(2, *encoded.shapes[0]), *torch.zeros(2, 2, dtype=torch.bool), "cpu")
    added = {"text_embeds": inputs["pooled"], "time_ids": inputs["time_ids"]}

    def work():
        unet(inputs["latents"], 500, inputs["prompt_embeds"], added_cond_kwargs=added).sample.sum().backward()

    with FlopCounterMode(display=False) as counter:
        work()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profiler:
        work()
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    trace = t4.read(tmp_path / "trace.json")
    multiply = {f"aten::{name}" for name in (*t4.MATMULS, "convolution", "convolution_backward")} - {"aten::linear"}
    numbers = [e["args"]["External id"] for e in trace["traceEvents"] if e.get("name") in multiply]
    trace["traceEvents"] += [{"ph": "X", "cat": "kernel", "dur": 1, "args": {"External id": n}} for n in numbers]
    counted = {"linear": 0, "conv": 0}
    for called, count in counter.get_flop_counts()["Global"].items():
        counted["conv" if "convolution" in str(called) else "linear"] += count
    found = t4.summary(trace)["tflop_by_kind"]
    assert len(numbers) > 100
    assert {kind: pytest.approx(value * 1e12, rel=1e-9) for kind, value in found.items() if value} == counted


def row(variant, mode, **figures):
    return dict.fromkeys(ladder.FIELDS, "") | {"recipe": "naruto-1024", "variant": variant, "attention": mode} | figures


def test_the_ladder_compares_with_the_stock_script_under_the_same_attention():
    rows = [
        row("stock script", "T4-like", gpu_ms="200", update_s="8"),
        row("stock script", "own", gpu_ms="100", update_s="6"),
        row("fast", "own", gpu_ms="25", update_s="0.5"),
    ]
    table = ladder.full(rows).splitlines()
    headings, fast = ([cell.strip() for cell in line.split("|")] for line in (table[0], table[4]))
    cells = dict(zip(headings, fast, strict=True))
    assert math.isclose(float(cells["× faster"]), 12) and cells["GPU work"] == "25 ms"
    assert fast[headings.index("GPU work") + 1] == "0.25"


def test_the_front_page_names_both_anchors_and_the_share_of_each():
    times = {"naruto-1024": (3000, 2000, 1000), "naruto-256": (2000, 1000, 500)}
    variants = (*ladder.ANCHORS, ladder.OURS)
    rows = [
        row(variant, mode, t4_ms=str(ms), reserved_gib="9", device="a GPU", torch="2") | {"recipe": name}
        for name, found in times.items() for variant, ms in zip(variants, found, strict=True)
        for mode in ("own", "T4-like")
    ]  # fmt: skip
    sentence, table, note = ladder.short(rows).split("\n\n")
    assert "takes 0.33 of the time" in sentence and "and 0.50 of the time of the same step with its inputs" in sentence
    assert "`naruto-256` it is 0.25 and 0.50." in sentence and "modelled, not measured" in note
    assert table.splitlines()[-1] == "| naruto_lora | 1,000 ms | 9.0 | 500 ms | 9.0 |"


def test_the_readmes_tables_match_the_results():
    for file, text in ladder.files().items():
        assert file.read_text(encoding="utf-8") == text, f"run python tests/benchmarks/ladder.py: {file} is behind"
