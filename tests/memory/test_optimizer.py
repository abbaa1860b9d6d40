"""The optimizer's saved state: whatever doesn't fit the LoRA is found before anything is loaded."""

import re

import pytest
import torch
from helpers import Watcher, same_adapter
from safetensors.torch import load_file, save_file

from naruto_lora import checkpoint, train
from naruto_lora.memory import optimizer
from naruto_lora.recipe import Leg

CPU = torch.device("cpu")


def shorter(state):
    """What ended the process with exit status -6: torch's fused Adam writes past the end of a short moment."""
    for name in optimizer.ADAM:
        state[f"0.{name}"] = torch.zeros(3)


def without_a_parameter(state):
    """What trained on silently, with moments of zero."""
    for key in [key for key in state if key.startswith("1.")]:
        del state[key]


def without_a_moment(state):
    del state["3.exp_avg_sq.tensor"]


def in_16_bits(state):
    state["2.exp_avg.tensor"] = state["2.exp_avg.tensor"].half()


def without_a_step(state):
    del state["0.step.tensor"]


def with_three_steps(state):
    state["0.step.tensor"] = torch.zeros(3)


def with_one_parameter_more(state):
    last = max(int(key.split(".")[0]) for key in state)
    for name in (*optimizer.ADAM, "step.tensor"):
        state[f"{last + 1}.{name}"] = state[f"{last}.{name}"].clone()


def of_another_rank(state):
    for key, value in list(state.items()):
        state[key] = torch.zeros([side * 2 if side == 4 else side for side in value.shape]) if value.ndim else value


def of_no_known_key(state):
    state["momentum"] = torch.zeros(3)


def of_a_number_that_is_many(state):
    state["0.rate.number"] = torch.zeros(3)


def empty(state):
    state.clear()


def of_8_bits_without_scales(state):
    for key, value in list(state.items()):
        index, name, _ = key.split(".")
        new = {"exp_avg": "state1.tensor", "exp_avg_sq": "state2.tensor", "step": "step.number"}[name]
        state[f"{index}.{new}"] = torch.tensor(6) if name == "step" else value.byte()
        del state[key]


SPOILT = {
    shorter: "lacks|another shape|fits other parameters",
    without_a_parameter: r"optimizer.safetensors is that of \d+ parameters, not the \d+ of the LoRA",
    without_a_moment: "lacks 'exp_avg_sq.tensor' of parameter 3",
    in_16_bits: "has a 'exp_avg.tensor' of another shape or type for parameter 2",
    without_a_step: "lacks 'step.tensor' of parameter 0",
    with_three_steps: "has a 'step.tensor' of another shape or type for parameter 0",
    with_one_parameter_more: r"is that of \d+ parameters, not the \d+ of the LoRA",
    of_another_rank: "fits other parameters",
    of_no_known_key: "can't be read .unknown tensor 'momentum'",
    of_a_number_that_is_many: "'0.rate.number' is no single number",
    empty: "optimizer.safetensors is empty",
    of_8_bits_without_scales: "lacks 'absmax1.tensor' of parameter 0",
}


@pytest.fixture(scope="module")
def begun(plan, cache_folder, tmp_path_factory):
    """A run of four steps, with checkpoints 2 and 4."""
    folder = tmp_path_factory.mktemp("begun")
    train.train(plan.replace(legs=(Leg(4, 2e-2),)), folder, cache_folder)
    return folder


def spoil(path, how):
    """Changes a checkpoint's optimizer file and makes its checksums anew; returns the old content."""
    file = path / "optimizer.safetensors"
    before, state = file.read_bytes(), load_file(file)
    how(state)
    save_file(state, file)
    (path / checkpoint.SUMS).write_text(checkpoint._sums(path))
    return before


@pytest.mark.parametrize("how", SPOILT, ids=lambda how: how.__name__)
def test_a_state_that_does_not_fit_is_skipped_for_an_older_one(begun, how):
    newest, notes = begun / "checkpoint-4", Watcher()
    before = spoil(newest, how)
    assert checkpoint.newest([begun], notes) == begun / "checkpoint-2"
    (note,) = notes.notes
    assert note.startswith(f"{newest} is skipped: ") and re.search(SPOILT[how], note) and "\n" not in note
    (newest / "optimizer.safetensors").write_bytes(before)
    (newest / checkpoint.SUMS).write_text(checkpoint._sums(newest))
    assert checkpoint.problem(newest) is None


def test_the_run_goes_on_from_the_older_one_with_the_same_result(plan, trained, begun, cache_folder):
    spoil(begun / "checkpoint-4", shorter)
    train.train(plan, begun, cache_folder)
    assert same_adapter(begun, trained.folder)


def made(kind, count=2):
    """An optimizer of `count` parameters after one step."""
    parameters = [torch.nn.Parameter(torch.ones(64, 100 + k)) for k in range(count)]
    if kind == "torch":
        chosen = optimizer.make_optimizer(parameters, CPU)
    else:
        pytest.importorskip("bitsandbytes")
        from naruto_lora.memory.adam import JoinedAdamW8bit

        chosen = JoinedAdamW8bit(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    if kind == "torch":
        chosen.step()
    return chosen


@pytest.mark.parametrize("kind", ["torch", "bitsandbytes"])
def test_a_state_is_checked_against_its_own_optimizer_before_anything_is_loaded(kind, tmp_path):
    whole, target = optimizer.flatten(made(kind)), made(kind)
    shapes = {f"{k}": torch.zeros(64, 100 + k) for k in range(2)}
    save_file(whole, tmp_path / "state.safetensors")
    save_file(shapes, tmp_path / "lora.safetensors")
    assert optimizer.misfit(tmp_path / "state.safetensors", tmp_path / "lora.safetensors", 1) is None
    swapped = {f"{1 - int(key[0])}{key[1:]}": value for key, value in whole.items()}
    other = optimizer.flatten(made("bitsandbytes" if kind == "torch" else "torch"))
    for state, said in (
        (swapped, "of another shape or type for parameter 0: resume the run where"),
        ({key: value for key, value in whole.items() if key[0] == "0"}, "is that of 1 parameters, not the 2"),
        (other, "was made on a GPU: resume" if kind == "torch" else "was made on a CPU: resume"),
    ):
        before = optimizer.flatten(target)
        with pytest.raises(ValueError, match=said):
            optimizer.load_flat(target, state)
        after = optimizer.flatten(target)
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    optimizer.load_flat(target, whole)
    assert all(torch.equal(whole[key], value) for key, value in optimizer.flatten(target).items())


def test_before_the_first_update_there_is_no_state(tmp_path):
    save_file({}, tmp_path / "state.safetensors")
    save_file({"a": torch.zeros(4, 8)}, tmp_path / "lora.safetensors")
    files = tmp_path / "state.safetensors", tmp_path / "lora.safetensors"
    assert optimizer.misfit(*files, 0) is None and "is empty" in optimizer.misfit(*files, 1)
    optimizer.load_flat(made("torch"), {})
