"""Checkpoints: whole or not there, the newest three, restored bit for bit."""

import pytest
import torch

from naruto_lora import checkpoint, lora, models, train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def stepped(base):
    """A U-Net with LoRA and its optimizer after two steps on random gradients."""
    return _stepped(base, 2)


def _stepped(base, steps):
    unet = models.load_unet(base, torch.float32, CPU)
    parameters = lora.inject(unet, 4, 10)
    optimizer = train.make_optimizer(parameters, CPU)
    for k in range(steps):
        _step(parameters, optimizer, k)
    return unet, parameters, optimizer


def _step(parameters, optimizer, k):
    generator = torch.Generator().manual_seed(k)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def test_restored_it_steps_on_bit_for_bit(base, stepped, tmp_path):
    unet, _, optimizer = stepped
    folder = checkpoint.save(tmp_path, 2, unet, optimizer, {"note": "hello"})
    assert checkpoint.read_state(folder) == {"note": "hello", "step": 2}
    _, expected, _ = _stepped(base, 3)
    unet, parameters, optimizer = _stepped(base, 0)
    checkpoint.restore(folder, unet, optimizer)
    _step(parameters, optimizer, 2)
    assert all(torch.equal(a, b) for a, b in zip(parameters, expected, strict=True))


def test_the_newest_three_stay_in_order_of_their_steps(stepped, tmp_path):
    unet, _, optimizer = stepped
    for step in (2, 8, 10, 90, 100):
        checkpoint.save(tmp_path, step, unet, optimizer, {})
    assert [path.name for path in checkpoint.find(tmp_path)] == ["checkpoint-10", "checkpoint-90", "checkpoint-100"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-100", "checkpoint-90"]


def test_what_is_not_whole_is_not_found(stepped, tmp_path):
    unet, _, optimizer = stepped
    whole = checkpoint.save(tmp_path, 4, unet, optimizer, {})
    (tmp_path / ".writing-6").mkdir()
    (tmp_path / "checkpoint-8").mkdir()  # without its state
    (tmp_path / "checkpoint-old").mkdir()
    assert checkpoint.find(tmp_path) == [whole]
    assert checkpoint.find(tmp_path / "nowhere") == []


def test_a_kill_while_writing_leaves_the_older_one_whole(stepped, tmp_path, monkeypatch):
    unet, _, optimizer = stepped
    whole = checkpoint.save(tmp_path, 4, unet, optimizer, {})

    def kill(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_file", kill)  # after the adapter, before the optimizer
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, 6, unet, optimizer, {})
    monkeypatch.undo()
    assert (tmp_path / ".writing-6" / lora.FILE).is_file()
    assert checkpoint.find(tmp_path) == [whole]
    again = checkpoint.save(tmp_path, 6, unet, optimizer, {})
    assert checkpoint.find(tmp_path) == [whole, again] and not (tmp_path / ".writing-6").exists()


def test_an_optimizers_plain_numbers_survive_too(tmp_path, stepped):
    wrapped = {"absmax": torch.zeros(3, dtype=torch.uint8)}  # as bitsandbytes gives it

    class Odd:
        def __init__(self, state):
            self.state = state

        def state_dict(self):
            return {"state": self.state, "param_groups": []}

        def load_state_dict(self, state):
            self.state = state["state"]

    unet = stepped[0]
    state = {0: {"step": 7, "m": torch.ones(2), "q": wrapped}, 11: {"rate": 0.5}}
    folder = checkpoint.save(tmp_path, 1, unet, Odd(state), {})
    odd = Odd({})
    checkpoint.restore(folder, unet, odd)
    assert odd.state[0]["step"] == 7 and odd.state[0]["m"].tolist() == [1, 1] and odd.state[11] == {"rate": 0.5}
    assert odd.state[0]["absmax"].dtype == torch.uint8  # as bitsandbytes reads it back: not wrapped
