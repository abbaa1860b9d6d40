"""What the machine is, and where results go."""

import importlib
import sys
import types

import pytest

from naruto_lora import colab


@pytest.fixture
def on_colab(monkeypatch):
    """Colab's kernel, as far as it can be seen from Python; the list of folders that Drive was mounted at."""
    mounted = []
    package, drive = types.ModuleType("google.colab"), types.ModuleType("google.colab.drive")
    drive.mount = mounted.append
    package.drive, package.__path__ = drive, []
    package.__spec__ = importlib.machinery.ModuleSpec("google.colab", None)
    google = types.ModuleType("google")
    google.colab, google.__path__ = package, []
    for name, module in (("google", google), ("google.colab", package), ("google.colab.drive", drive)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab-external_20260801")
    return mounted


def test_here_the_folder_is_made_as_it_is(tmp_path, monkeypatch):
    monkeypatch.delenv("COLAB_RELEASE_TAG", raising=False)
    monkeypatch.chdir(tmp_path)
    assert not colab.on_colab()
    assert colab.storage("runs/mine") == (tmp_path / "runs" / "mine").resolve()
    assert (tmp_path / "runs" / "mine").is_dir()
    assert colab.storage("runs/mine", interactive=False) == colab.storage("runs/mine")


def test_colabs_variable_alone_is_not_colab(monkeypatch):
    monkeypatch.setenv("COLAB_RELEASE_TAG", "x")  # as on Kaggle
    monkeypatch.setattr(sys, "path", [])  # no google package at all
    importlib.invalidate_caches()
    assert not colab.on_colab()


def test_on_colab_results_go_to_drive_where_somebody_can_answer(on_colab, tmp_path, monkeypatch):
    assert colab.on_colab()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(colab, "Path", _under(tmp_path))
    assert colab.storage("runs") == tmp_path / "content/drive/MyDrive/naruto_lora/runs"
    assert on_colab == ["/content/drive"]


def test_on_colab_training_is_on_the_machines_own_disk_and_mirrored_on_drive(on_colab, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert colab.places("runs", interactive=False) == (tmp_path / "runs", None)
    assert colab.places(str(tmp_path / "own")) == (tmp_path / "own", None)  # an absolute path is as it is
    assert on_colab == []
    monkeypatch.setattr(colab, "Path", _under(tmp_path))
    here, mirror = colab.places("runs")
    assert here == tmp_path / "content/runs" and mirror == colab.storage("runs") != here
    assert here.is_dir() and mirror.is_dir()


def test_elsewhere_there_is_no_mirror(tmp_path, monkeypatch):
    monkeypatch.delenv("COLAB_RELEASE_TAG", raising=False)
    monkeypatch.chdir(tmp_path)
    assert colab.places("runs") == (tmp_path / "runs", None)


def _under(root):
    """`Path`, with /content moved below `root`."""
    from pathlib import Path

    return lambda path: Path(str(path).replace("/content", f"{root}/content", 1))


def test_on_colab_nobody_is_asked_when_nobody_can_answer(on_colab, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert colab.storage("runs", interactive=False) == (tmp_path / "runs").resolve()
    assert colab.storage(str(tmp_path / "own")) == (tmp_path / "own").resolve()  # an absolute path stays
    assert on_colab == []


def test_the_machines_table(tmp_path):
    rows = {row["what"]: row["here"] for row in colab.machine(tmp_path)}
    assert rows["GPU"] == "none: CPU only" and rows["GPU memory"] == "-"
    assert float(rows["host memory"].split()[0]) > 0.5 and int(rows["processors"]) >= 1
    assert rows["Python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
    import torch

    assert rows["torch"] == torch.__version__ and colab._version("no-such-package") == "not installed"
