"""8-bit Adam over joined tensors: bitsandbytes' own values and states, bit for bit, in far fewer launches."""

import copy
import sys

import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.optim import AdamW8bit

from naruto_lora import checkpoint, lora, models, train
from naruto_lora.memory import adam
from naruto_lora.memory.fallback import Rung

SHAPES = [(16, 320), (320, 16), (16, 640), (3, 5), (16, 257), (1280, 16)]  # two can't be joined


def _pair(shapes=SHAPES):
    """The same parameters under bitsandbytes' optimizer and under ours."""
    generator = torch.Generator().manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    theirs = copy.deepcopy(ours)
    return (theirs, AdamW8bit(theirs, weight_decay=1e-2)), (ours, adam.JoinedAdamW8bit(ours, weight_decay=1e-2))


def _step(pair, number, leave_out=None):
    for parameters, optimizer in pair:
        generator = torch.Generator().manual_seed(number)
        for place, parameter in enumerate(parameters):
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = None if place == leave_out else gradient
        optimizer.param_groups[0]["lr"] = 1e-3 * number
        optimizer.step()


def _same(pair):
    (theirs, their_optimizer), (ours, our_optimizer) = pair
    for one, two in zip(theirs, ours, strict=True):
        assert torch.equal(one, two)
        expected, found = their_optimizer.state[one], our_optimizer.state[two]
        assert expected.keys() == found.keys() and expected["step"] == found["step"]
        assert all(torch.equal(expected[key], found[key]) for key in expected if key != "step")


@pytest.mark.parametrize("piece", [adam.PIECE, 8192])
def test_each_value_equals_bitsandbytes(piece, monkeypatch):
    monkeypatch.setattr(adam, "PIECE", piece)
    pair = _pair()
    before = [p.detach().clone() for p in pair[1][0]]
    for number in range(1, 6):
        _step(pair, number)
        _same(pair)
    assert not any(torch.equal(a, b) for a, b in zip(before, pair[1][0], strict=True))


def test_a_tensor_without_a_gradient_does_not_change():
    pair = _pair()
    for number, left_out in enumerate((1, None, 2, None), start=1):  # never stepped; then stepped later than the others
        _step(pair, number, left_out)
        for parameters, optimizer in pair:
            assert left_out is None or optimizer.state.get(parameters[left_out], {}).get("step", 0) < number
        for one, two in zip(*(parameters for parameters, _ in pair), strict=True):
            assert torch.equal(one, two)


def test_weights_that_were_moved_are_joined_again():
    pair = _pair()
    for number in range(1, 6):
        if number == 4:
            for parameters, _ in pair:
                parameters[0].data = parameters[0].data * 2
        _step(pair, number)
        _same(pair)


def test_far_fewer_launches(monkeypatch):
    calls, real = [], functional.optimizer_update_8bit_blockwise
    monkeypatch.setattr(
        functional, "optimizer_update_8bit_blockwise", lambda *a, **k: (calls.append(1), real(*a, **k))[1]
    )
    _, ours = _pair([(16, 320)] * 500)
    _step([ours], 1)
    assert len(calls) == 2  # 500 * 5120 numbers in pieces of 2 ** 21


def test_on_a_gpu_training_uses_it():
    made = train.make_optimizer([torch.nn.Parameter(torch.zeros(16, 320))], torch.device("cuda"))
    assert isinstance(made, adam.JoinedAdamW8bit)


def test_without_bitsandbytes_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "naruto_lora.memory.adam", None)
    with pytest.raises(RuntimeError, match="pip install bitsandbytes"):
        train.make_optimizer([torch.nn.Parameter(torch.zeros(16, 320))], torch.device("cuda"))


def test_each_optimizer_resumes_from_the_others_checkpoint(base, tmp_path):
    def begun(kind):
        unet = models.load_unet(base, torch.float32, torch.device("cpu"))
        parameters = lora.inject(unet, 32, 32.0)
        return unet, parameters, kind(parameters, weight_decay=1e-2)

    for kind, other in ((AdamW8bit, adam.JoinedAdamW8bit), (adam.JoinedAdamW8bit, AdamW8bit)):
        unet, parameters, optimizer = begun(kind)
        for number in (1, 2, 3):
            _step([(parameters, optimizer)], number)
        assert torch.uint8 in {optimizer.state[p]["state1"].dtype for p in parameters}
        folder = checkpoint.save(tmp_path / kind.__name__, 3, unet, optimizer, {})
        again, restored, resumed = begun(other)
        for number in (7, 8):
            _step([(restored, resumed)], number)
        checkpoint.restore(folder, again, resumed)
        for number in (4, 5):
            _step([(parameters, optimizer), (restored, resumed)], number)
        assert all(torch.equal(a, b) for a, b in zip(parameters, restored, strict=True))


def test_a_lean_run_with_it_equals_one_with_bitsandbytes_resumed_or_not(plan, cache_folder, tmp_path, monkeypatch):
    of = plan.replace(rank=32, alpha=32.0, holdout=0.0, previews=0)  # tensors small and large

    def trained(kind, pause):
        monkeypatch.setattr(train, "make_optimizer", lambda parameters, device: kind(parameters, weight_decay=1e-2))
        folder, rungs = tmp_path / f"{kind.__name__}-{pause}", [Rung(of.batch)]
        run = train.begin(of, folder, cache_folder, rungs=rungs)
        for _ in range(pause):
            run.update()
            run.step += 1
        if pause:
            run.save()
            run = train.begin(of, folder, cache_folder, rungs=rungs)
        run.to_the_end()
        return run

    expected, *others = (trained(*which) for which in (
        (AdamW8bit, 0), (adam.JoinedAdamW8bit, 0), (adam.JoinedAdamW8bit, 3)
    ))  # fmt: skip
    assert {state["state1"].dtype for state in expected.optimizer.state.values()} == {torch.uint8, torch.float32}
    for run in others:
        assert run.record["losses"] == expected.record["losses"][-len(run.record["losses"]) :]
        assert all(torch.equal(a, b) for a, b in zip(run.parameters, expected.parameters, strict=True))
