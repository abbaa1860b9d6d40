"""colab_setup.sh on machines like Colab's, from nothing: what it changes, and the five notebooks after it.

    python tests/colab_image --out DIR [--python PATH ...] [--quick]

For each image (`july.txt` for Python 3.12, `august.txt` for 3.13) a fresh virtual environment is made in DIR with the
image's versions (6 GB each: torch as the registry has it, with CUDA). Each check is one line; the status is 1 if any
fails. `floors` is Python 3.11 with the lowest versions that requirements.txt admits, for the quick tests.
Not for CI: some minutes and gigabytes an image.
"""

import argparse
import difflib
import os
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
IMAGES = {"july": "3.12", "august": "3.13", "floors": "3.11"}
CHANGES = [r"\+-e .*", r"\+bitsandbytes==[\d.]+", r"-torchao==0\.10\.0"]  # all that set-up may change


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="where the environments and the runs go")
    parser.add_argument("--image", nargs="+", choices=IMAGES, default=["july", "august"])
    parser.add_argument("--python", nargs="*", default=[], help="interpreters beside those on the PATH")
    parser.add_argument("--quick", action="store_true", help="without running the notebooks")
    args = parser.parse_args()
    args.out = args.out.resolve()
    return 1 if any([not check(name, args) for name in args.image]) else 0


def check(name: str, args) -> bool:
    """Makes the image `name` unless it's there, then tries it; returns whether every check held."""
    folder = args.out / name
    if not (folder / "bin" / "python").exists():
        interpreter = find(IMAGES[name], args.python)
        if interpreter is None:
            print(f"{name}: there is no Python {IMAGES[name]} here; name one with --python", flush=True)
            return False
        subprocess.run([interpreter, "-m", "venv", "--clear", folder], check=True)
        with open(args.out / f"{name}.log", "w") as log:
            command = [folder / "bin/python", "-m", "pip", "install", *versions(name)]
            subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    return quick_tests(folder) if name == "floors" else prepared(name, folder, args)


def find(version: str, more: list[str]) -> str | None:
    asked = "import sys; print('%d.%d' % sys.version_info[:2])"
    for name in (*more, f"python{version}", "python3"):
        try:
            found = subprocess.run([name, "-c", asked], capture_output=True, text=True)
        except OSError:
            continue
        if found.stdout.strip() == version:
            return name
    return None


def versions(name: str) -> list[str]:
    """What pip is to install for an image."""
    if name != "floors":
        return ["-r", str(HERE / f"{name}.txt")]
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["test"]
    return [line.replace(">=", "==") for line in lines if ">=" in line] + tools


def prepared(name: str, folder: Path, args) -> bool:
    """Set-up without arguments, twice; then with `run`, which asks for papermill as well, and the five notebooks."""
    held, before = [], freeze(folder)

    def say(ok: bool, text: str) -> None:
        held.append(ok)
        print(f"{name:<8} {'held' if ok else 'NOT HELD'}: {text}", flush=True)

    first = setup(folder)
    print(first.stdout + first.stderr, end="")
    changed = [line for line in difflib.unified_diff(before, freeze(folder), n=0, lineterm="") if line[:2] not in
               ("--", "++", "@@")]
    say(first.returncode == 0 and len(changed) == len(CHANGES)
        and all(any(re.fullmatch(p, line) for line in changed) for p in CHANGES), f"pip freeze changed by {changed}")
    begun = time.time()
    second = setup(folder)
    took = time.time() - begun
    say(second.returncode == 0 and took < 1 and len(second.stdout.splitlines()) == 1, f"again: {took:.2f} s")
    modules = ["lora", "train", "pipeline", "memory.plan", "measure.study", "show.report", "colab.storage"]
    code = f"import importlib; [importlib.import_module('naruto_lora.' + name) for name in {modules}]; "
    code += "from peft.import_utils import is_torchao_available as there; assert not there()"
    imported = python(folder, "-c", code)
    say(imported.returncode == 0, f"import {', '.join(modules)} {imported.stderr[-300:]}")
    if not args.quick:
        pinned, done = freeze(folder), setup(folder, "run", "--out", str(args.out / f"{name}-run"))
        say(done.returncode == 0, f"five notebooks: {(done.stdout + done.stderr)[-400:]}")
        lost = sorted(set(pinned) - set(freeze(folder)))
        say(not lost, f"with papermill and nbval, versions that changed: {lost}")
    return all(held)


def quick_tests(folder: Path) -> bool:
    """The tests that aren't slow, where everything is as old as requirements.txt admits."""
    done = python(folder, "-m", "pytest", "-q", "-m", "not slow", "tests", cwd=ROOT)
    print(f"floors   {'held' if done.returncode == 0 else 'NOT HELD'}: {done.stdout[-600:]}", flush=True)
    return done.returncode == 0


def environment(folder: Path) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME")}
    return kept | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "COLAB_RELEASE_TAG": "release-colab"}


def setup(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = ["bash", str(ROOT / "colab_setup.sh"), *arguments]
    return subprocess.run(command, env=environment(folder), capture_output=True, text=True, cwd=folder)


def python(folder: Path, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    command = [str(folder / "bin" / "python"), *arguments]
    return subprocess.run(command, env=environment(folder), capture_output=True, text=True, cwd=cwd or folder)


def freeze(folder: Path) -> list[str]:
    lines = python(folder, "-m", "pip", "freeze").stdout.splitlines()
    return [line for line in lines if not line.startswith("#")]


if __name__ == "__main__":
    sys.exit(main())
