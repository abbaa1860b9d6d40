"""The package as a whole: light to import, one direction, complete when it is installed."""

import glob
import subprocess
import sys
from pathlib import Path

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
    import tomllib

    settings = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text())
    patterns = settings["tool"]["setuptools"]["package-data"]["naruto_lora"]
    found = (name for pattern in patterns for name in glob.glob(pattern, root_dir=FOLDER, recursive=True))
    packed = {Path(name) for name in found if (FOLDER / name).is_file()}  # as setuptools finds them
    needed = {p.relative_to(FOLDER) for p in FOLDER.rglob("*")
              if p.suffix in (".json", ".safetensors", ".txt", ".md") and p.is_file()}
    assert needed and needed <= packed, needed - packed
    assert settings["project"]["version"] == naruto_lora.__version__


def test_the_linter_has_nothing_to_say():
    ruff = [sys.executable, "-m", "ruff", "check", "--no-cache", FOLDER.parent]
    result = subprocess.run(ruff, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:]
