"""The house: imports go one way, every room says what is in it, nothing in it is too large."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import structure

import naruto_lora

PACKAGE = Path(naruto_lora.__file__).parent
ROOT = PACKAGE.parent
WINGS = sorted(path.parent for path in PACKAGE.glob("*/__init__.py") if path.parent.name != "tiny")
LINTER = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"


def lint(folder):
    """import-linter's exit status and words, for the package in `folder`."""
    command = [sys.executable, "-c", LINTER]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, env={"PYTHONPATH": str(folder)})
    return result.returncode, result.stdout + result.stderr


def test_imports_go_one_way():
    status, said = lint(ROOT)
    assert status == 0, said


@pytest.mark.parametrize("file, line, broken", [
    ("hub.py", "from . import data", "Imports go one way"),
    ("memory/gpu.py", "from .. import train", "Imports go one way"),
    ("memory/gpu.py", "from . import plan", "A wing"),
    ("show/report.py", "from ..widgets import viewer", "Imports go one way"),
    ("colab/share.py", "from ..tiny import BASE", "embedded default"),
])  # fmt: skip
def test_an_import_that_goes_the_other_way_is_found(tmp_path, file, line, broken):
    shutil.copytree(PACKAGE, tmp_path / "naruto_lora", ignore=shutil.ignore_patterns("base", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    text = (tmp_path / "naruto_lora" / file).read_text()
    (tmp_path / "naruto_lora" / file).write_text(f"{text}\n{line}\n")
    status, said = lint(tmp_path)
    assert status == 1 and re.search(f"{broken}.* BROKEN", said), said


def test_a_new_module_must_be_given_its_place(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "naruto_lora", ignore=shutil.ignore_patterns("base", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "naruto_lora" / "extra.py").write_text("")
    status, said = lint(tmp_path)
    assert status == 1 and "extra" in said, said


@pytest.mark.parametrize("what", structure.BOUNDS)
def test_nothing_is_too_large(what):
    figure, where = structure.measure()[what]
    assert 0 < figure <= structure.BOUNDS[what], where


def test_sizes_are_counted_as_a_reader_counts():
    source = """
def f():
    for a in b:
        if a:
            pass
        elif b:
            pass
        elif c:
            with d:
                pass
"""
    (function,) = ast.parse(source).body
    assert structure.depth(function) == 3


@pytest.mark.parametrize("wing", WINGS, ids=lambda path: path.name)
def test_a_wing_says_what_is_in_it(wing):
    text = (wing / "__init__.py").read_text()
    assert len(ast.parse(text).body) == 1 and ast.get_docstring(ast.parse(text))  # words, and nothing else
    listed = re.findall(r"^- `(\w+)`: ", text, re.MULTILINE)
    assert sorted(listed) == sorted(path.stem for path in wing.glob("*.py") if path.stem != "__init__")
    assert re.search(r"^[\w` ,]+ import", text, re.MULTILINE), "it says who may import it"


def test_the_front_door_knows_every_module_and_room():
    rooms = {path.stem for path in PACKAGE.glob("*.py")} | {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert {name for name in rooms if not name.startswith("__")} == set(naruto_lora.MODULES)


def test_tests_sit_in_folders_like_the_rooms():
    folders = {path.parent.name for path in (ROOT / "tests").rglob("test_*.py")} - {"tests", "whole", "fuzz"}
    assert folders == {wing.name for wing in WINGS} | {"tiny"}


def test_the_map_is_the_house():
    """naruto_lora/README.md names every module of the ground floor and every wing, once, and nothing else."""
    text = (PACKAGE / "README.md").read_text()
    rows = re.findall(r"^\| (`[^|]+`) \|", text, re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`(\w+/?)`", row)]
    modules = [path.stem for path in PACKAGE.glob("*.py") if not path.stem.startswith("__")]
    assert sorted(named) == sorted([*modules, *(f"{wing.name}/" for wing in WINGS), "tiny/"])
    (order,) = re.findall(r"^A room imports only what stands below it: (.*)\. Nothing imports `tiny/`", text, re.M)
    drawn = [set(re.findall(r"[\w/]+", level)) for level in order.split(" · ")]
    layers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]["layers"]
    held = [set(re.findall(r"\w+", layer)) for layer in reversed(layers) if layer not in ("tiny", "__main__")]
    assert [{name.strip("/") for name in level} for level in drawn] == held
