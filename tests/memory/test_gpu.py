"""GPU memory: how much is free, and what `free` releases."""

import subprocess
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch

from naruto_lora.memory import gpu


def test_without_a_gpu_there_is_no_peak():
    assert gpu.peak_gib() is None
    gpu.reset_peak()


def test_without_a_gpu_the_card_is_the_cpu_with_its_free_memory():
    card = gpu.Card.here(torch.device("cpu"))
    assert not card.cuda and 0 < card.free == card.host_free and card.cores >= 1


@pytest.mark.parametrize(
    "free, cap, reserved, allocated, expected",
    [
        (14.0, 1.0, 0.0, 0.0, 14.0),
        (6.0, 1.0, 8.0, 5.0, 9.0),  # torch's unused cache counts as free, live tensors do not
        (14.0, 0.5, 2.0, 1.0, 6.5),  # a cap on torch, half of 15 GiB here
    ],
)
def test_the_free_memory_of_a_gpu(monkeypatch, free, cap, reserved, allocated, expected):
    about = SimpleNamespace(name="a card", major=7, minor=5, multi_processor_count=40)
    answers = {
        "mem_get_info": (free * gpu.GIB, 15 * gpu.GIB),
        "memory_reserved": reserved * gpu.GIB,
        "memory_allocated": allocated * gpu.GIB,
        "get_device_properties": about,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, answer=answer: answer)

    def fraction(device):
        assert isinstance(device, int)  # torch 2.11 refuses a device without a number
        return cap

    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", fraction)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    card = gpu.Card.here(torch.device("cuda"))
    assert (card.name, card.free / gpu.GIB, card.sm, card.processors) == ("a card", expected, 75, 40)


def test_free_releases_garbage_and_a_kept_traceback(monkeypatch):
    class Heavy:
        pass

    def fail():
        heavy = Heavy()
        heavy.itself = heavy  # a cycle: only the garbage collector frees it
        seen.append(weakref.ref(heavy))
        raise ValueError

    seen = []
    try:
        fail()
    except ValueError as error:
        monkeypatch.setattr(sys, "last_traceback", error.__traceback__, raising=False)
        monkeypatch.setattr(sys, "last_value", error.with_traceback(None), raising=False)
    assert seen[0]() is not None
    gpu.free()
    assert seen[0]() is None


def test_free_releases_what_a_failed_cell_holds():
    cell = "seen = []\ndef fail():\n    heavy = {1}\n    seen.append(weakref.ref(heavy))\n    raise ValueError\n"
    code = f"""if True:
        import weakref
        from IPython.core.interactiveshell import InteractiveShell
        from naruto_lora.memory import gpu
        shell = InteractiveShell.instance()
        shell.run_cell("import weakref")
        shell.run_cell({cell!r})
        shell.run_cell("fail()", store_history=True)
        seen = shell.user_ns["seen"]
        assert seen[0]() is not None
        gpu.free()
        assert seen[0]() is None, "still held"
    """
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("cap, expected", [(1.0, 30 + 5), (0.3, 30 - 20 + 5)])
def test_available_memory_includes_the_cache_and_respects_the_cap(monkeypatch, cap, expected):
    """Of 100 bytes 30 are free and 20 reserved, 15 of these in use; other programs have the rest."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    answers = {"mem_get_info": (30, 100), "memory_reserved": 20, "memory_allocated": 15,
               "get_per_process_memory_fraction": cap}
    for name, value in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert gpu.available(torch.device("cuda")) == expected


def test_a_parts_row_counts_parameters_and_bytes():
    half = torch.nn.Linear(1000, 1000, bias=False, dtype=torch.float16)
    row = gpu.row("a layer", half)
    assert row == {"part": "a layer", "million parameters": "1.0", "GiB": f"{2e6 / 2**30:.3g}"}
