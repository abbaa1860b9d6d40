"""The machine, the form, and where results are saved."""

import importlib
import json
import os
import shutil
import sys
import types
from pathlib import Path

import pytest

from naruto_lora.colab import form, machine, share, storage


@pytest.fixture
def on_colab(monkeypatch):
    """Simulates Colab's kernel, as Python sees it; returns the list of folders where Drive was mounted."""
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


def test_off_colab_the_folder_is_created_where_it_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("COLAB_RELEASE_TAG", raising=False)
    monkeypatch.chdir(tmp_path)
    assert not machine.on_colab()
    assert storage.places("runs/mine") == ((tmp_path / "runs" / "mine").resolve(), None)
    assert (tmp_path / "runs" / "mine").is_dir()


def test_colabs_variable_without_its_package_is_not_colab(monkeypatch):
    monkeypatch.setenv("COLAB_RELEASE_TAG", "x")  # as on Kaggle
    monkeypatch.setattr(sys, "path", [])  # no google package at all
    importlib.invalidate_caches()
    assert not machine.on_colab()


def test_on_colab_runs_are_on_the_machines_disk_and_mirrored_on_drive(on_colab, tmp_path, monkeypatch):
    assert machine.on_colab()
    monkeypatch.chdir(tmp_path)
    assert storage.places("runs", drive=False) == (tmp_path / "runs", None)
    assert storage.places(str(tmp_path / "own")) == (tmp_path / "own", None)  # an absolute path is as it is
    assert on_colab == []
    monkeypatch.setattr(storage, "Path", _under(tmp_path))
    here, mirror = storage.places("runs")
    assert (here, mirror) == (tmp_path / "content/runs", tmp_path / "content/drive/MyDrive/naruto_lora/runs")
    assert here.is_dir() and mirror.is_dir() and on_colab == ["/content/drive"]


def _under(root):
    """`Path`, with /content moved below `root`."""
    from pathlib import Path

    return lambda path: Path(str(path).replace("/content", f"{root}/content", 1))


def test_the_machines_table(tmp_path):
    rows = {row["what"]: row["here"] for row in machine.rows(tmp_path)}
    assert rows["GPU"] == "none: CPU only" and rows["GPU memory"] == "-"
    assert float(rows["host memory"].split()[0]) > 0.5 and int(rows["processors"]) >= 1
    assert rows["Python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
    import torch

    assert torch.__version__.split("+")[0] == rows["torch"].split("+")[0]
    assert machine.installed("no-such-package") is None


def test_without_permission_for_drive_there_is_no_mirror(on_colab, tmp_path, monkeypatch, capsys):
    def refuse(_):
        raise ValueError("mount failed")

    sys.modules["google.colab.drive"].mount = refuse
    monkeypatch.setattr(storage, "Path", _under(tmp_path))
    assert storage.places("runs") == (tmp_path / "content/runs", None)
    assert "Google Drive is not mounted (mount failed)" in capsys.readouterr().out


FORM = 'recipe = "naruto-1024"  # @param {type:"string"}\nrank = 16  # @param {type:"integer"}'


@pytest.mark.parametrize(
    "cells, message",
    [
        (["", FORM, "# Parameters\nrank = 4\n"], None),
        (["", FORM, "rnak = 4"], None),  # a user's own cell
        (["", "%pip list", FORM], None),
        (["", "# Parameters\nrnak = 4\n"], None),  # no form to compare with
        (["", FORM, "# Parameters\nrnak = 4\n"], "no parameter 'rnak': did you mean 'rank'"),
        (["", FORM, '# Parameters\nrank = 4\nzebra = "x"\n'], "no parameter 'zebra': it has rank, recipe"),
    ],
)
def test_an_unknown_parameter_is_refused_with_the_nearest_name(cells, message):
    if message is None:
        return form.check_parameters(cells)
    with pytest.raises(ValueError, match=message):
        form.check_parameters(cells)


TYPES = """
runs = "runs"  # @param {type:"string"}
recipe = "naruto-1024"  # @param ["naruto-1024", "naruto-256"] {allow-input: true}
steps = 40  # @param {type:"integer"}
max_minutes = 0.0  # @param {type:"number"}
disconnect = False  # @param {type:"boolean"}
"""


@pytest.mark.parametrize("name, value, message", [
    ("disconnect", "false", "`disconnect` must be True or False, not 'false'"),  # papermill's -p disconnect false
    ("disconnect", 0, "`disconnect` must be True or False, not 0"),
    ("steps", "ten", "`steps` must be a whole number, not 'ten'"),
    ("steps", 1.5, "`steps` must be a whole number, not 1.5"),
    ("steps", True, "`steps` must be a whole number, not True"),
    ("max_minutes", None, "`max_minutes` must be a number, not None"),
    ("max_minutes", True, "`max_minutes` must be a number, not True"),
    ("runs", 2024, "`runs` must be text in quotes, not 2024"),
    ("recipe", 256, "`recipe` must be text in quotes, not 256"),
    ("max_minutes", 7, None), ("disconnect", True, None), ("steps", 0, None), ("other", object(), None),
])  # fmt: skip
def test_a_value_of_another_type_is_refused_by_name(name, value, message):
    if message is None:
        return form.check_parameters(["", TYPES], {name: value})
    with pytest.raises(ValueError) as caught:
        form.check_parameters(["", TYPES, f"# Parameters\n{name} = {value!r}\n"], {name: value})
    assert str(caught.value) == message


def test_every_parameter_of_the_notebooks_has_a_type_that_is_checked():
    notebooks = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
    assert len(notebooks) == 5
    for notebook in notebooks:
        cells = ["".join(cell["source"]) for cell in json.loads(notebook.read_text())["cells"]]
        (source,) = [cell for cell in cells if "# @param" in cell]
        values: dict = {}
        exec(source, values)
        form.check_parameters(cells, values)
        for name in set(values) - {"__builtins__"}:
            with pytest.raises(ValueError, match=f"`{name}` must be"):
                form.check_parameters(cells, values | {name: object()})


def test_the_state_says_whether_a_run_is_resumed(plan, trained, tmp_path):
    assert storage.done(plan, tmp_path) == 0 and storage.done(plan, tmp_path, trained.folder.parent) == 6
    assert "There is no run of few yet." in storage.state(plan, tmp_path)
    assert "few was found, and its training is complete (step 6)." in storage.state(plan, trained.folder.parent)
    longer = plan.replace(legs=(*plan.legs, {"until": 9, "lr": 1e-3}))
    said = storage.state(longer, tmp_path, trained.folder.parent)  # found only in the mirror
    assert "few was found at step 6 of 9: training resumes" in said and "are copied to Google Drive at once" in said


def test_an_adapter_is_found_by_name_or_path_or_as_the_newest(trained, tmp_path):
    runs, name = trained.folder.parent, trained.folder.name
    assert storage.find_adapter(name, runs) == trained.folder
    assert storage.find_adapter(name, tmp_path, runs) == trained.folder  # on Drive
    assert storage.find_adapter(str(trained.adapter), tmp_path) == trained.adapter
    assert storage.find_adapter("", runs) == trained.folder
    older = tmp_path / "older"
    shutil.copytree(trained.folder, older)
    os.utime(older / trained.adapter.name, (1, 1))
    assert storage.find_adapter("", tmp_path, runs) == trained.folder
    for name in ("", "none"):
        with pytest.raises(FileNotFoundError, match="run 02_train_256 or 03_train_1024 first"):
            storage.find_adapter(name, tmp_path / "empty")


def test_a_run_that_is_removed_meanwhile_is_passed_over(tmp_path, monkeypatch):
    for name in ("kept", "removed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "pytorch_lora_weights.safetensors").write_bytes(b"x")
    os.utime(tmp_path / "kept" / "pytorch_lora_weights.safetensors", (0, 0))
    whole = Path.glob

    def removed_after(path, pattern):
        found = list(whole(path, pattern))
        shutil.rmtree(tmp_path / "removed")
        return found

    monkeypatch.setattr(Path, "glob", removed_after)
    assert storage.find_adapter("", tmp_path) == tmp_path / "kept"


def test_off_colab_downloads_and_the_end_do_nothing(tmp_path, capsys):
    share.download(tmp_path / "a.safetensors", interactive=True)  # not on Colab
    share.push(tmp_path, "")
    machine.end(True)
    assert f"a.safetensors is in the folder '{tmp_path.name}'" in capsys.readouterr().out
