"""The package as a whole: light to import, one direction, complete when it is installed."""

import glob
import os
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import naruto_lora

FOLDER = Path(naruto_lora.__file__).parent
MODULES = sorted(".".join(path.relative_to(FOLDER).with_suffix("").parts) for path in FOLDER.rglob("*.py"))
HEAVY = ("diffusers", "transformers", "peft", "accelerate", "datasets", "matplotlib", "ipywidgets", "IPython",
         "huggingface_hub", "bitsandbytes", "pandas", "scipy", "torch._dynamo", "torch._inductor", "torchvision")
LATE = ("widgets.viewer", "widgets.comparer", "widgets.ballot", "widgets.review", "memory.adam",
        "__main__")  # heavy, imported when used


def run(code, cwd):
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)


def test_importing_the_package_loads_nothing():
    heavy = ("torch", "numpy", "PIL", *HEAVY)
    code = f"import sys; import naruto_lora; print([m for m in {heavy} if m in sys.modules])"
    assert run(code, FOLDER.parent).stdout.strip() == "[]"


def test_importing_every_module_is_light_and_silent_and_leaves_no_trace(tmp_path):
    light = [module.removesuffix(".__init__") for module in MODULES if module not in LATE]
    light = [module for module in light if not module.startswith("tiny.pretrain") and module != "__init__"]
    names = [f"naruto_lora.{module}" for module in light]
    code = f"""
import sys, os, random, warnings
sys.path.insert(0, {str(FOLDER.parent)!r})
environment, filters = dict(os.environ), None
import torch, numpy
state, filters, threads = torch.get_rng_state(), list(warnings.filters), torch.get_num_threads()
import importlib
for name in {names}:
    importlib.import_module(name)
assert torch.equal(state, torch.get_rng_state()) and torch.get_num_threads() == threads
assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()
assert dict(os.environ) == environment and warnings.filters == filters
assert not torch.cuda.is_initialized()
print([m for m in {HEAVY} if m in sys.modules])
"""
    result = run(code, tmp_path)
    assert (result.stdout.strip(), result.stderr) == ("[]", "")
    assert list(tmp_path.iterdir()) == []


def test_nothing_outside_tiny_knows_of_it():
    for file in FOLDER.rglob("*.py"):
        if "tiny" not in file.parts and file != FOLDER / "__init__.py":  # which lists every room
            assert "tiny" not in file.read_text(), file


def test_what_is_installed_has_its_data():
    settings = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text())
    patterns = settings["tool"]["setuptools"]["package-data"]["naruto_lora"]
    found = (name for pattern in patterns for name in glob.glob(pattern, root_dir=FOLDER, recursive=True))
    packed = {Path(name) for name in found if (FOLDER / name).is_file()}  # as setuptools finds them
    needed = {p.relative_to(FOLDER) for p in FOLDER.rglob("*")
              if p.suffix in (".json", ".safetensors", ".txt", ".md") and p.is_file()}
    assert needed and needed <= packed, needed - packed
    assert settings["project"]["version"] == naruto_lora.__version__


def misfits(requirements):
    """What is not installed, or in another version, of `requirements` and of all that they require in turn."""
    todo, done, wrong = [Requirement(text) for text in requirements], set(), []
    while todo:
        needed = todo.pop()
        if str(needed) in done:
            continue
        done.add(str(needed))
        try:
            found = distribution(needed.name)
        except PackageNotFoundError:
            wrong.append(f"{needed} is not installed")
            continue
        if not needed.specifier.contains(found.version, prereleases=True):
            wrong.append(f"{needed} is {found.version}")
        for more in map(Requirement, found.requires or ()):
            if more.marker is None or any(more.marker.evaluate({"extra": extra}) for extra in ("", *needed.extras)):
                more.marker = None
                todo.append(more)
    return wrong


def test_what_is_installed_fits_together():
    """As `pip check`, but only for what this package needs: an environment may hold other things that don't fit."""
    lines = [line for line in (FOLDER.parent / "requirements.txt").read_text().splitlines() if line[0] != "#"]
    tools = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]["test"]
    assert misfits([*lines, *tools]) == []


def test_what_does_not_fit_is_named():
    assert misfits(["pytest<1"]) == [f"pytest<1 is {pytest.__version__}"]
    assert misfits(["no-such-package-here>=1"]) == ["no-such-package-here>=1 is not installed"]


def check_types(folder):
    """mypy's exit status and words, for the package in `folder`."""
    command = [sys.executable, "-m", "mypy", "--no-incremental", f"--cache-dir={os.devnull}"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return result.returncode, result.stdout + result.stderr


def test_the_type_checker_has_nothing_to_say():
    status, said = check_types(FOLDER.parent)
    assert status == 0, said[-2000:]


@pytest.mark.parametrize("file, line, found", [
    ("recipe.py", "adjust('naruto-256')", 'expected "Recipe"'),
    ("memory/plan.py", "MARGIN.nothing", '"float" has no attribute'),
    ("cache.py", "def f(cache: Cache) -> int: return cache.names", "Incompatible return value"),
])  # fmt: skip
def test_a_wrong_type_is_found(tmp_path, file, line, found):
    shutil.copytree(FOLDER, tmp_path / "naruto_lora", ignore=shutil.ignore_patterns("base", "__pycache__"))
    shutil.copy(FOLDER.parent / "pyproject.toml", tmp_path)
    with open(tmp_path / "naruto_lora" / file, "a") as source:
        source.write(f"\n{line}\n")
    status, said = check_types(tmp_path)
    assert status == 1 and found in said, said


def test_the_linter_has_nothing_to_say():
    ruff = [sys.executable, "-m", "ruff", "check", "--no-cache", FOLDER.parent]
    result = subprocess.run(ruff, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:]
