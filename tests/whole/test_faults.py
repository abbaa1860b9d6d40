"""Faults of the world around a run, injected for real; FAULTS.md has a row for each, and names its test."""

import ast
import contextlib
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
from functools import cache
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from helpers import Watcher, same_adapter
from test_hub import Hub

from naruto_lora import cache as encodings
from naruto_lora import checkpoint, files, gallery, lora, pipeline, train
from naruto_lora.recipe import Leg

ROOT = Path(__file__).parents[2]
PAGE = Path(__file__).with_name("FAULTS.md")
ROWS = [
    [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")
][2:]  # without the head and its line


# the page


@cache
def strings() -> list[str]:
    """Every text in the package, with \\0 for what is filled in."""
    found = []
    for file in (ROOT / "naruto_lora").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    cells = "".join((ROOT / "notebooks" / "01_setup.ipynb").read_text(encoding="utf-8").splitlines())
    return [*found, re.sub(r"\{.*?\}", "\0", cells)]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_each_row_has_a_test_and_quotes_what_the_code_says(row):
    _, seen, safe, tests = row
    names = re.findall(r"`([\w/]+\.py)::(\w+)`", tests)
    assert names and safe
    for file, name in names:
        tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, name
    for sentence in re.findall(r"`([^`]+)`", seen):
        pattern = ".*".join(map(re.escape, sentence.split("…")))
        assert any(re.search(pattern, text, re.DOTALL) for text in strings()), sentence


def test_each_fault_that_is_injected_here_has_a_row():
    tree = ast.parse(Path(__file__).read_text(encoding="utf-8"))
    here = {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}
    assert here - {name for row in ROWS for name in re.findall(r"::(\w+)`", row[3])} == {
        "test_each_row_has_a_test_and_quotes_what_the_code_says", "test_each_fault_that_is_injected_here_has_a_row",
    }  # fmt: skip


# disks


@contextlib.contextmanager
def no_file_above(size: int):
    """The kernel refuses to write any file beyond `size` bytes, whoever writes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def plain(caught) -> str:
    """The error's message, which must be a sentence or two in one line."""
    text = str(caught.value)
    assert "\n" not in text and text.count(". ") <= 1 and not text.startswith("["), text
    return text


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if ".writing" in path.name)


def test_a_cache_that_cant_be_written(plan, examples, tmp_path):
    with no_file_above(1000), pytest.raises(OSError) as caught:
        encodings.encode(examples[0], plan, tmp_path)
    assert f"'{tmp_path / 'prompts'}' can't be written (File too large): it needs" in plain(caught)
    assert len(encodings.encode(examples[0], plan, tmp_path)) == len(examples[0]) and left(tmp_path) == []


def test_a_checkpoint_that_cant_be_written(plan, trained, cache_folder, tmp_path):
    run = train.begin(plan, tmp_path, cache_folder, Watcher())
    run.record["holdout"]["0"] = trained.record["holdout"]["0"]
    real, begun = run.update, []

    def update():
        if run.step == 3:
            begun.append(limited.enter_context(no_file_above(1000)))
        return real()

    run.update = update
    with contextlib.ExitStack() as limited, pytest.raises(OSError) as caught:
        run.to_the_end()
    assert "checkpoint-4 can't be written to" in plain(caught) and "continue from step 2" in plain(caught)
    assert [path.name for path in checkpoint.find(tmp_path)] == ["checkpoint-2"] and left(tmp_path) == []
    run.folder.close()
    train.train(plan, tmp_path, cache_folder, Watcher())
    assert begun and same_adapter(tmp_path, trained.folder)


def test_a_lora_that_cant_be_written(plan, trained, cache_folder, tmp_path):
    run = train.begin(plan, tmp_path, cache_folder, Watcher())
    run.to_the_end()
    with no_file_above(1000), pytest.raises(OSError) as caught:
        run.finish()
    run.folder.close()
    assert "the LoRA can't be written to" in plain(caught) and str(tmp_path / "checkpoint-6") in plain(caught)
    assert not (tmp_path / lora.FILE).exists() and not (tmp_path / "run.json").exists()
    train.train(plan, tmp_path, cache_folder, Watcher())
    assert same_adapter(tmp_path, trained.folder)


def test_previews_that_cant_be_written(previewed, cache_folder, tmp_path):
    watcher = Watcher()
    run = train.begin(previewed, tmp_path, cache_folder, watcher)
    with no_file_above(100):
        run.validation.preview(0)
    assert "no previews (" in watcher.notes[-1] and watcher.notes[-1].endswith("; the run continues")
    assert left(tmp_path) == []
    run.validation.preview(0)
    assert len(list((tmp_path / "previews").iterdir())) == 2
    run.folder.close()


def test_pictures_and_figures_that_cant_be_written(pipe, tmp_path):
    few = {"steps": 1, "resolution": 32, "guidance_scale": 1.0}
    gallery.draw_to(tmp_path, pipe, ["a man"], **few)
    files.write_json(tmp_path / "compare.json", {"old": 1})
    with no_file_above(200):
        for write in (lambda: gallery.draw_to(tmp_path, pipe, ["a man", "a woman"], batch=1, **few),
                      lambda: files.write_json(tmp_path / "compare.json", {"new": "x" * 1000})):
            with pytest.raises(OSError) as caught:
                write()
            assert "can't be written (File too large): make room there, or choose another folder" in plain(caught)
    assert left(tmp_path) == [] and len(list(tmp_path.glob("*.png"))) == 1
    assert files.read_json(tmp_path / "compare.json") == {"old": 1}


def test_a_drive_that_vanishes_and_comes_back(plan, trained, cache_folder, tmp_path):
    drive, away = tmp_path / "drive", tmp_path / "away"
    drive.mkdir()

    def act(step):
        if step == 3:
            drive.rename(away)
        if step == 5:
            away.rename(drive)

    watcher = Watcher(act)
    train.train(plan, tmp_path / "run", cache_folder, watcher, drive / "run")
    assert [note for note in watcher.notes if "no copy" in note] == [
        f"no copy in the mirror '{drive / 'run'}' (No such file or directory); the run continues"
    ]
    assert same_adapter(drive / "run", trained.folder) and checkpoint.newest([drive / "run"]).name == "checkpoint-6"


# this machine


def test_host_memory_that_runs_out(plan, trained, cache_folder, tmp_path, monkeypatch):
    """The third step asks the machine for more memory than any has."""
    run = train.begin(plan, tmp_path, cache_folder, Watcher())
    run.record["holdout"]["0"] = trained.record["holdout"]["0"]
    real = run._accumulate
    monkeypatch.setattr(run, "_accumulate", lambda draw: torch.empty(2**58) if run.step == 2 else real(draw))
    with pytest.raises(RuntimeError) as caught:
        run.to_the_end()
    run.folder.close()
    assert plain(caught).startswith("step 3 does not fit in this machine's memory (")
    assert "close other programs, or choose a `recipe` with a lower resolution" in plain(caught)
    assert checkpoint.newest([tmp_path]).name == "checkpoint-2"


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_an_interrupt_of_the_command(plan, tmp_path, number, status):
    """While it encodes and trains: the signal comes from outside, after the first checkpoint or before any."""
    file = tmp_path / "plan.json"
    file.write_text(plan.replace(legs=(Leg(5000, 1e-3),), save_every=1, measure_every=5000, holdout=0.0).to_json())
    command = [sys.executable, "-m", "naruto_lora", "train", file, "--out", tmp_path / "run"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    for line in process.stdout:
        if "training" in line:
            process.send_signal(number)
            break
    said = process.stdout.read()
    assert process.wait() == status and "Traceback" not in said, said
    step = int(re.search(r"interrupted at step (\d+) of 5000, saved in '.*': run it again to continue", said)[1])
    assert checkpoint.newest([tmp_path / "run"]).name == f"checkpoint-{step}"
    assert number != signal.SIGINT or said.splitlines()[-1] == "interrupted: the same command continues"


def test_an_interrupt_while_pictures_are_encoded(plan, examples, tmp_path):
    def show(phase, done, total):
        if phase == "pictures":
            signal.raise_signal(signal.SIGINT)

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        encodings.encode(examples[0], plan, tmp_path, show)
    assert threading.active_count() == before and left(tmp_path) == []
    assert len(encodings.encode(examples[0], plan, tmp_path)) == len(examples[0])


def test_an_interrupt_while_a_picture_is_drawn(pipe, tmp_path):
    few = {"steps": 3, "resolution": 32, "guidance_scale": 2.0, "adapter": "style"}
    expected = pipeline.draw(pipe, ["a man"], **few)[0].tobytes()
    for at in (1, 3):
        def show(phase, done, total, at=at):
            if done == at:
                signal.raise_signal(signal.SIGINT)

        with pytest.raises(KeyboardInterrupt):
            gallery.draw_to(tmp_path, pipe, ["a man"], show=show, **few)
    assert left(tmp_path) == [] and pipeline.draw(pipe, ["a man"], **few)[0].tobytes() == expected


# the hub


class Faulty(Hub):
    """Serves repositories by what is wrong with them."""

    def _file(self, file):
        fault = file.parent.name
        content = file.read_bytes()
        if fault == "refused":
            return self._refuse(401, "")
        if fault == "broken":
            return self._refuse(500, "")
        if self.command == "GET" and fault in ("damaged", "slow"):
            start = int((self.headers.get("Range") or "bytes=0-").split("=")[1].split("-")[0])
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            half = len(content) // 2
            if fault == "damaged":
                self.wfile.write(content[start:half])
                self.close_connection = True
                return None
            for at in range(start, len(content), len(content) // 8):
                self.wfile.write(content[at : at + len(content) // 8])
                self.wfile.flush()
                self.server.released.wait(0.3)
            return None
        return super()._file(file)


@pytest.fixture
def faulty(tmp_path, trained):
    """The address of a hub on this machine whose repositories are called by their faults."""
    faults = ("gated", "refused", "broken", "damaged", "slow")
    for fault in faults:
        (tmp_path / fault).mkdir()
        shutil.copy(trained.adapter, tmp_path / fault / lora.FILE)
    handler = type("Handler", (Faulty,), {"gated": {"models/it/gated"}, "stalled": set(), "asked": []})
    handler.repositories = {f"models/it/{fault}": tmp_path / fault for fault in faults}
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.released, server.daemon_threads = threading.Event(), True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield "http://{}:{}".format(*server.server_address)
    server.released.set()
    server.shutdown()


def downloads(endpoint: str, home: Path, *names: str) -> dict[str, str]:
    """{name: what is said, or the file's folder}, downloaded by the hub's own client in a process of its own."""
    code = (
        "import sys\nfrom naruto_lora import hub\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n        print(name, hub.adapter(name), sep='\\t')\n"
        "    except Exception as error:\n        print(name, error, sep='\\t')\n"
    )
    env = {key: value for key, value in os.environ.items() if key not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    env |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(line.split("\t") for line in done.stdout.splitlines() if "\t" in line)


def test_a_hub_that_refuses_breaks_or_is_slow(faulty, trained, tmp_path):
    said = downloads(faulty, tmp_path / "home", "it/gated", "it/refused", "it/broken", "it/damaged", "it/slow", "it/no")
    assert "the model 'it/gated' is gated: accept its terms at https://huggingface.co/it/gated" in said["it/gated"]
    assert said["it/refused"].startswith("the hub refuses the model 'it/refused': log in with a token that may read it")
    assert "the model 'it/no' is neither a folder here nor on the hub" in said["it/no"]
    assert said["it/no"].endswith("check the name; a private one needs HF_TOKEN")
    for name in ("it/broken", "it/damaged"):
        assert f"the model '{name}' is no folder here, and can't be downloaded from the hub (" in said[name]
        assert said[name].endswith("): check the name and the network")
    slow = Path(said["it/slow"])
    assert slow.name == lora.FILE and slow.read_bytes() == trained.adapter.read_bytes()


def test_a_hub_that_cant_be_reached(tmp_path):
    said = downloads("http://127.0.0.1:9", tmp_path / "home", "it/any")["it/any"]
    assert "the model 'it/any' is no folder here, and can't be downloaded" in said and said.endswith("the network")
