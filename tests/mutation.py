"""Mutation testing: one small change at a time in a module; tests that still pass have not seen it.

    python tests/mutation.py naruto_lora/recipe.py tests/test_recipe.py [--workers N] [--limit N --seed S] [--minutes M]

Paths inside naruto_lora are modules to change, the others are tests to run (folders and `file::test` too). Printed:
killed of all mutants by function, then each survivor with its line and change. A test that hangs counts as a kill. Each
worker forks from a process that has imported torch, and changes its own copy of the checkout. Not for CI: each mutant
costs a run of the tests, up to the first that fails.

Why not mutmut 3: it credits what a session fixture calls to the first test that asks for the fixture and runs no other
test on it, which here lets most mutants of training survive; it also leaves out functions that have a decorator.
"""

import argparse
import ast
import collections
import importlib
import json
import os
import queue
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLIPS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.Add: ast.Sub, ast.Sub: ast.Add,
    ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult,
    ast.And: ast.Or, ast.Or: ast.And, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr,
}  # fmt: skip
SWAPS = {"min": "max", "max": "min", "any": "all", "all": "any"}
PLAIN = (ast.AugAssign, ast.Raise, ast.Break, ast.Continue, ast.Delete)  # statements that `pass` can replace
SKIPPED = {"annotation", "returns", "decorator_list"}  # fields whose code a run doesn't use
PATIENCE, GRACE = 5, 20.0  # a mutant may take this many times the slowest clean run's seconds, and these seconds
NEEDED = ("naruto_lora", "tests", "pyproject.toml", "requirements.txt", "README.md", "colab_setup.sh")


@dataclass(frozen=True)
class Mutant:
    file: str  # relative to the checkout
    function: str
    line: int
    change: str
    source: str  # the whole module


def mutants(file: str, text: str) -> list[Mutant]:
    """All mutants of a module, in its order; docstrings, texts, annotations and decorators stay as they are."""
    lines = [line.encode() for line in text.splitlines(keepends=True)]
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    whole, found = text.encode(), []
    for node, function, field in _nodes(ast.parse(text), "the module"):
        for new in _changes(node) or ([f"(not ({ast.unparse(node)}))"] if field == "test" else []):
            begin = starts[node.lineno - 1] + node.col_offset
            end = starts[node.end_lineno - 1] + node.end_col_offset
            old = " ".join(whole[begin:end].decode().split())
            source = (whole[:begin] + new.encode() + whole[end:]).decode()
            with suppress(SyntaxError):
                compile(source, file, "exec")
                found.append(Mutant(file, function, node.lineno, f"{old}  ->  {new}", source))
    return found


def _nodes(node: ast.AST, function: str):
    """(node, name of the function or class around it, field) of everything below `node` that may be changed."""
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if field in SKIPPED or not isinstance(child, ast.AST) or isinstance(child, ast.JoinedStr):
                continue
            named = isinstance(child, (ast.FunctionDef, ast.ClassDef))
            name = (child.name if function == "the module" else f"{function}.{child.name}") if named else function
            if hasattr(child, "lineno"):
                yield child, name, field
            yield from _nodes(child, name)


def _changes(node: ast.AST) -> list[str]:
    """What can stand in place of `node`."""
    match node:
        case ast.Compare():
            flipped = [[FLIPS[type(op)]() if k == n else op for n, op in enumerate(node.ops)]
                       for k in range(len(node.ops))]
            return [f"({ast.unparse(ast.Compare(node.left, ops, node.comparators))})" for ops in flipped]
        case ast.BinOp(left, op, right) if type(op) in FLIPS:
            return [f"({ast.unparse(ast.BinOp(left, FLIPS[type(op)](), right))})"]
        case ast.BoolOp(op, values):
            return [f"({ast.unparse(ast.BoolOp(FLIPS[type(op)](), values))})"]
        case ast.UnaryOp(ast.Not() | ast.USub(), operand):
            return [f"({ast.unparse(operand)})"]
        case ast.IfExp(_, body, other):
            return [f"({ast.unparse(body)})", f"({ast.unparse(other)})"]
        case ast.Constant(bool(value)):
            return [str(not value)]
        case ast.Constant(int(value) | float(value)):
            return [repr(value + 1)]
        case ast.Name(name, ast.Load()) if name in SWAPS:
            return [SWAPS[name]]
        case ast.Return(value) if value is not None and ast.unparse(value) != "None":
            return ["return None"]
        case ast.Assign([ast.Attribute() | ast.Subscript(), *_]) | ast.Expr(ast.Call() | ast.Yield() | ast.BoolOp()):
            return ["pass"]
    return ["pass"] if isinstance(node, PLAIN) else []


class Worker:
    """A process of `serve` in its own copy of the checkout."""

    def __init__(self, folder: Path, tests: list[str]):
        for name in NEEDED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, folder / name)
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
        }  # fmt: skip
        command = [sys.executable, str(folder / "tests" / "mutation.py"), "--serve", *tests]
        self.process = subprocess.Popen(command, cwd=folder, env=environment, text=True, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE)

    def run(self, file: str = "", source: str = "", timeout: float = 3600.0) -> tuple[int | None, float]:
        """(pytest's exit status, seconds) with `source` in place of `file`; status None: it hung."""
        print(json.dumps([file, source, timeout]), file=self.process.stdin, flush=True)
        return tuple(json.loads(self.process.stdout.readline()))


def serve(tests: list[str]) -> None:
    """Runs `tests` in forked children, one for each line [file, source, timeout] of the input."""
    import pytest  # noqa: F401
    import torch  # noqa: F401

    for line in sys.stdin:
        file, source, timeout = json.loads(line)
        original = Path(file).read_text() if file else ""
        if file:
            Path(file).write_text(source)
        begun, (reader, writer) = time.monotonic(), os.pipe()
        child = os.fork()
        if child == 0:
            _child(tests, writer)
        os.close(writer)
        status = _wait(child, begun + timeout)
        if file:
            Path(file).write_text(original)
        with open(reader) as names:  # what the clean run imported is imported here, once for all children
            for name in [] if file else names.read().split():
                with suppress(Exception):
                    importlib.import_module(name)
        print(json.dumps([status, time.monotonic() - begun]), flush=True)


def _child(tests: list[str], writer: int) -> None:
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    import pytest

    status = 99
    with suppress(BaseException):
        options = ["-x", "-q", "-p", "no:cacheprovider", "--basetemp", str(Path.cwd() / "temporary")]
        status = int(pytest.main([*options, *tests]))
        here = str(Path.cwd())
        files = {name: getattr(module, "__file__", None) or "" for name, module in list(sys.modules.items())}
        if not files["naruto_lora"].startswith(here):
            status = 98
        os.write(writer, "\n".join(name for name, file in files.items() if "site-packages" in file).encode()[:60_000])
    os._exit(status)


def _wait(child: int, until: float) -> int | None:
    """The child's exit status; None, after killing it and what it started, if it runs longer."""
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("paths", nargs="+", help="modules of naruto_lora, and tests")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--limit", type=int, help="how many mutants, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1e9, help="no new mutant after these")
    args = parser.parse_args()
    end = time.monotonic() + 60 * args.minutes
    modules = [path for path in args.paths if path.startswith("naruto_lora")]
    tests = [path for path in args.paths if path not in modules]
    todo = [mutant for file in modules for mutant in mutants(file, (ROOT / file).read_text())]
    if args.limit and args.limit < len(todo):
        todo = [todo[k] for k in sorted(random.Random(args.seed).sample(range(len(todo)), args.limit))]
    counts: dict = collections.defaultdict(collections.Counter)  # by file and function
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.workers) as pool:
        workers = [Worker(Path(folder, str(k)), tests) for k in range(min(args.workers, len(todo)))]
        for _ in ("cold", "warm"):
            clean = list(pool.map(Worker.run, workers))
            if any(status != 0 for status, _ in clean):
                raise SystemExit(f"without a change the tests must pass here, and import this copy: {clean[0][0]}")
        timeout = PATIENCE * max(seconds for _, seconds in clean) + GRACE
        if 0 in [workers[0].run(file, "raise ImportError", timeout)[0] for file in modules]:
            raise SystemExit("the tests don't import a module that is to be changed: choose others")
        free = queue.SimpleQueue()
        for worker in workers:
            free.put(worker)

        def judge(mutant: Mutant) -> None:
            worker = free.get()
            if time.monotonic() < end:
                status, _ = worker.run(mutant.file, mutant.source, timeout)
                verdict = "hung" if status is None else "survived" if status == 0 else "killed"
                counts[mutant.file, mutant.function][verdict] += 1
                if status == 0:
                    print(f"survived: {mutant.file}:{mutant.line} {mutant.function}: {mutant.change}", flush=True)
            free.put(worker)

        list(pool.map(judge, todo))
        for worker in workers:
            worker.process.stdin.close()
            worker.process.wait()
    for (file, function), count in sorted(counts.items()):
        print(f"{file} {function}: {count['killed'] + count['hung']} of {count.total()}")
    for file in modules:
        total = sum((count for (where, _), count in counts.items() if where == file), collections.Counter())
        print(f"{file}: {total['killed'] + total['hung']} of {total.total()} killed, {total['hung']} of these hung")


if __name__ == "__main__":
    serve(sys.argv[2:]) if sys.argv[1:2] == ["--serve"] else main()
