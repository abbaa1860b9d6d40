"""Any folder of a run: checkpoints are found by name, and only whole ones are used."""

import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from fuzzing import JSON, TEXTS, fuzzed, is_sentence, spoilt
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from naruto_lora import checkpoint

WEIGHTS = {"down": torch.zeros(2, 8), "up": torch.zeros(8, 2)}
STATE = {f"{k}.{name}.tensor": torch.ones(() if name == "step" else weight.shape)
         for k, weight in enumerate(WEIGHTS.values()) for name in ("exp_avg", "exp_avg_sq", "step")}  # fmt: skip
WHOLE = dict(zip(checkpoint.FILES, (save(WEIGHTS), save(STATE), b'{"step": 3}'), strict=True))
NAMES = st.one_of(
    st.integers(0, 9).map(lambda step: f"checkpoint-{step}"),
    st.one_of(TEXTS, st.sampled_from(["²", "٣", "007", "3 ", "3.tmp", "-3", "9" * 200])).map("checkpoint-{}".format),
    st.sampled_from([".writing-3", ".old-checkpoint-3", "previews", "run.json", "Checkpoint-3", "checkpoint-"]),
)  # fmt: skip
KINDS = st.sampled_from(["whole", "whole", "folder", "file", "link", "loop", "dangling"])


def content(name: str):
    """Any bytes of a checkpoint's file; None: it is missing; "folder", "loop": not a file."""
    odd = [st.just(WHOLE[name]), spoilt(WHOLE[name]), st.binary(max_size=40), st.sampled_from([None, "folder", "loop"])]
    if name.endswith(".json"):
        odd += [JSON.map(lambda value: json.dumps(value).encode()),
                JSON.map(lambda value: json.dumps({"step": value}).encode()),
                st.integers(1, 9000).map(lambda depth: b"[" * depth)]  # fmt: skip
    else:
        odd.append(header(WHOLE[name]))
    return st.one_of(odd)


def header(whole: bytes):
    """A safetensors file whose header says something else of one tensor."""
    length = int.from_bytes(whole[:8], "little")
    tensors = json.loads(whole[8 : 8 + length])

    def change(key, what, value, renamed) -> bytes:
        made = json.loads(json.dumps(tensors))
        made[renamed or key] = made.pop(key) | {what: value}
        text = json.dumps(made).encode()
        return len(text).to_bytes(8, "little") + text + whole[8 + length :]

    return st.builds(
        change, st.sampled_from(sorted(set(tensors) - {"__metadata__"})),
        st.sampled_from(["dtype", "shape", "data_offsets"]),
        st.one_of(JSON, st.sampled_from(["F16", "U8", "I64", [16], [4, 4], [2, 8], [], [0, 64], [2**62, 4]])),
        st.one_of(st.none(), st.sampled_from(["0.exp_avg.number", "x", "0..tensor", "²." "step.tensor"]), TEXTS),
    )  # fmt: skip


@pytest.fixture(scope="module")
def place():
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def fill(folder: Path, files: dict, sums: bool) -> None:
    for name, value in files.items():
        if isinstance(value, bytes):
            (folder / name).write_bytes(value)
        elif value == "folder":
            (folder / name).mkdir()
        elif value == "loop":
            (folder / name).symlink_to(name)
    if sums and all(isinstance(value, bytes) for value in files.values()):
        (folder / checkpoint.SUMS).write_text(checkpoint._sums(folder))


def newest(folder: Path):
    """`checkpoint.newest`, whose notes are sentences."""
    notes = []
    display = type("Display", (), {"note": staticmethod(notes.append)})
    found = checkpoint.newest([folder], display)
    for note in notes:
        is_sentence(note, "is skipped: ")
    return found, notes


@given(st.dictionaries(NAMES, KINDS, max_size=6))
@fuzzed(0.06)
def test_any_names_in_a_runs_folder(place, entries):
    folder = place / "run"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, kind in entries.items():
        name = name.replace("\0", "_").replace("/", "_").encode("utf-8", "surrogatepass")[:250]
        path = folder / os.fsdecode(name)
        if os.path.lexists(path):
            continue
        if kind == "file":
            path.write_text("a file")
        elif kind in ("whole", "folder"):
            path.mkdir()
            if kind == "whole":
                fill(path, WHOLE, sums=True)
        else:
            path.symlink_to({"link": place, "loop": path, "dangling": folder / "nowhere"}[kind])
    found = checkpoint.find(folder)
    steps = [checkpoint.step_of(path) for path in found]
    assert steps == sorted(steps) and all(path.is_dir() and not path.is_symlink() for path in found)
    for path in found:
        reason = checkpoint.problem(path)
        assert reason is None or is_sentence(f"{path} is skipped: {reason}") is None
    used, notes = newest(folder)
    usable = [path for path in found if checkpoint.problem(path) is None]
    assert (used in usable and checkpoint.step_of(used) == 3) if usable else used is None
    assert len(notes) == len([path for path in found if not usable or checkpoint.step_of(path) > 3])
    checkpoint.remove_leftovers(folder)
    checkpoint.rotate(folder, 5, keep=1)
    assert all(path.is_symlink() or path in found or not path.is_dir() or path.name != f"checkpoint-{path.name[11:]}" or
               not re.fullmatch("0|[1-9][0-9]{0,8}", path.name[11:]) for path in folder.iterdir())  # fmt: skip


@given(st.fixed_dictionaries({name: content(name) for name in checkpoint.FILES}), st.booleans(),
       st.one_of(st.none(), spoilt(WHOLE["state.json"]), st.binary(max_size=90)))  # fmt: skip
@fuzzed(0.08)
def test_any_content_of_a_checkpoint(place, files, sums, odd_sums):
    folder = place / "run"
    shutil.rmtree(folder, ignore_errors=True)
    for step, content_of in ((2, WHOLE | {"state.json": b'{"step": 2}'}), (3, files)):
        (folder / f"checkpoint-{step}").mkdir(parents=True)
        fill(folder / f"checkpoint-{step}", content_of, sums or step == 2)
    if odd_sums is not None and not sums:
        (folder / "checkpoint-3" / checkpoint.SUMS).write_bytes(odd_sums)
    used, notes = newest(folder)
    assert used and len(notes) == (used.name == "checkpoint-2")
    if used.name == "checkpoint-3":
        assert checkpoint.read_state(used)["step"] == 3 and sums


def test_the_whole_one_is_whole(place):
    folder = place / "whole" / "checkpoint-3"
    folder.mkdir(parents=True)
    fill(folder, WHOLE, sums=True)
    assert checkpoint.problem(folder) is None
