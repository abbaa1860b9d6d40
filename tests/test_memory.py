"""Memory: when activations are recomputed, and what `free` lets go."""

import subprocess
import sys
import weakref

import pytest
import torch

from naruto_lora import memory


def test_nothing_is_recomputed_on_a_cpu():
    assert not memory.recompute_needed(torch.device("cpu"), 4096, 64)
    assert memory.peak_gib() is None
    memory.reset_peak()


@pytest.mark.parametrize(
    "gib, resolution, batch, needed",
    [
        (14.56, 1024, 1, False),  # a T4, both recipes
        (14.56, 256, 12, False),
        (14.56, 1024, 2, True),
        (8, 1024, 1, True),
        (8, 256, 12, True),
        (79, 1024, 8, False),
        (79, 1024, 12, True),
    ],
)
def test_recompute_by_card(monkeypatch, gib, resolution, batch, needed):
    card = type("Card", (), {"total_memory": gib * memory.GIB})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    assert memory.recompute_needed(torch.device("cuda"), resolution, batch) is needed


def test_free_lets_go_of_garbage_and_of_a_kept_traceback(monkeypatch):
    class Heavy:
        pass

    def fail():
        heavy = Heavy()
        heavy.itself = heavy  # a cycle: only the collector takes it
        seen.append(weakref.ref(heavy))
        raise ValueError

    seen = []
    try:
        fail()
    except ValueError as error:
        monkeypatch.setattr(sys, "last_traceback", error.__traceback__, raising=False)
        monkeypatch.setattr(sys, "last_value", error.with_traceback(None), raising=False)
    assert seen[0]() is not None
    memory.free()
    assert seen[0]() is None


def test_free_lets_go_of_what_a_failed_cell_held():
    cell = "seen = []\ndef fail():\n    heavy = {1}\n    seen.append(weakref.ref(heavy))\n    raise ValueError\n"
    code = f"""if True:
        import weakref
        from IPython.core.interactiveshell import InteractiveShell
        from naruto_lora import memory
        shell = InteractiveShell.instance()
        shell.run_cell("import weakref")
        shell.run_cell({cell!r})
        shell.run_cell("fail()", store_history=True)
        seen = shell.user_ns["seen"]
        assert seen[0]() is not None
        memory.free()
        assert seen[0]() is None, "still held"
    """
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("cap, expected", [(1.0, 30 + 5), (0.3, 30 - 20 + 5)])
def test_what_is_available_counts_the_cache_and_the_cap(monkeypatch, cap, expected):
    """Of 100 bytes 30 are free and 20 reserved, 15 of these in use; others have the rest."""
    told = {"mem_get_info": (30, 100), "memory_reserved": 20, "memory_allocated": 15,
            "get_per_process_memory_fraction": cap}
    for name, value in told.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert memory.available(torch.device("cuda")) == expected
