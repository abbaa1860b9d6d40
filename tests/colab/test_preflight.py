"""What a run needs and what a machine has, on simulated machines."""

import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from naruto_lora import recipe, tiny
from naruto_lora.colab import preflight
from naruto_lora.memory import gpu

FULL = recipe.load("naruto-1024")
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True, scope="module")
def shapes():
    """The full-size U-Net's sizes, calculated once for these tests and forgotten afterwards."""
    preflight.predict.shape.cache_clear()
    yield
    preflight.predict.shape.cache_clear()


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A T4's host with nothing to download, SDXL's U-Net at full size; `set(host=, disk=)` changes it."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    sdxl = __import__("sdxl")
    monkeypatch.setattr(preflight.predict.models, "unet_config", lambda base: sdxl.UNET)
    monkeypatch.setattr(preflight.hub, "missing", lambda recipe: [])
    monkeypatch.setattr(preflight.models, "vae_scale_factor", lambda base, vae="": 8)

    def set(host=11.0, disk=70e9, download=0):
        monkeypatch.setattr(gpu, "host_free", lambda: host * gpu.GIB)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(100e9, 0, disk))
        missing = [preflight.hub.Download("a/b", "model", ("x",), download)] if download else []
        monkeypatch.setattr(preflight.hub, "missing", lambda recipe: missing)

    set()
    return set


def rows(gib=None, plan=FULL):
    card = gpu.Card.of("a card", gib) if gib else gpu.Card("CPU", 11 * gpu.GIB)
    found = preflight.check(plan, ".", card)
    return found, {row.what: row for row in found}


def test_a_t4_is_enough():
    found, by = rows(14.56)
    preflight.refuse(found)
    others = [row.short for row in found if row.what not in preflight.PACKAGES]
    assert others == [""] * (len(found) - len(preflight.PACKAGES))
    assert "GiB: " in by["memory to train"].needed and by["memory to train"].as_dict()["enough?"] == "yes"


def test_without_a_gpu_it_names_the_menu():
    found, by = rows()
    assert "memory to train" not in by
    with pytest.raises(RuntimeError, match="GPU: none: CPU only.*Runtime › Change runtime type › T4 GPU"):
        preflight.refuse(found)
    found, _ = rows(plan=FULL.replace(precision="fp32"))
    preflight.refuse(found)  # slow, but it works


def test_smaller_cards_get_cheaper_plans_and_a_tiny_one_cannot_train():
    taken = {gib: rows(gib)[1]["memory to train"] for gib in (6, 8, 16)}
    assert all(row.short == "" for row in taken.values())
    assert len({row.needed for row in taken.values()}) == 3
    low = recipe.load("naruto-256")
    assert rows(16, low)[1]["memory to draw"] == rows(16)[1]["memory to draw"]  # both draw at the base's own size
    found, by = rows(2)
    assert "needs" in by["memory to train"].short and by["memory to draw"].short
    assert by["memory to train"].as_dict()["enough?"].startswith("warning")
    preflight.refuse(found)  # only the training cell stops


def test_little_host_memory_gives_a_warning(machine):
    machine(host=12.7 - 1.5)
    assert rows(14.56)[1]["host memory"].short == ""
    machine(host=2.0)
    found, by = rows(14.56)
    assert "exit 138" in by["host memory"].short
    preflight.refuse(found)


def test_a_full_disk_stops_the_notebook_before_the_download(machine):
    machine(disk=5e9, download=7e9)
    found, by = rows(14.56)
    with pytest.raises(RuntimeError, match="disk.*5.0 GB free, needed: .* GB; make room"):
        preflight.refuse(found)
    machine(disk=5e9)
    preflight.refuse(rows(14.56)[0])


def test_versions_are_compared_with_the_requirements(monkeypatch):
    floors = preflight.floors()
    assert {"torch", "diffusers", "peft"} <= set(floors)
    monkeypatch.setattr(preflight, "installed", lambda name: {"peft": "0.18.9", "torch": "2.11.0+cu128"}.get(name))
    by = {row.what: row for row in preflight._versions()}
    assert "newest runtime" in by["peft"].short and by["torch"].short == ""
    assert "colab_setup.sh" in by["diffusers"].short and by["bitsandbytes"].short == ""


def test_the_embedded_base_runs_anywhere(monkeypatch):
    monkeypatch.undo()
    plan = recipe.load(tiny.HIGH, base=str(tiny.BASE), vae="", dataset=str(tiny.BASE))
    found = preflight.check(plan, ".")
    preflight.refuse(found)
    assert [row.what for row in found][:4] == ["GPU", "memory to train", "memory to draw", "host memory"]
