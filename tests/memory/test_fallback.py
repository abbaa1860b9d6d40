"""A whole run with the lean step, and with the next rung where memory runs out."""

import dataclasses
import weakref

import pytest
import torch

from naruto_lora import checkpoint, lora, train
from naruto_lora.memory import fallback, lean
from naruto_lora.memory.fallback import Rung


@pytest.fixture(scope="module")
def lean_run(plan, cache_folder, tmp_path_factory):
    """`plan`, trained with the lean step."""
    folder = tmp_path_factory.mktemp("lean")
    run = train.begin(plan, folder, cache_folder, rungs=[Rung(plan.batch)])
    run.to_the_end()
    return run


def test_the_lean_step_learns_what_the_plain_step_learns(lean_run, trained):
    torch.testing.assert_close(
        torch.tensor(lean_run.record["losses"]), torch.tensor(trained.record["losses"]), rtol=1e-4, atol=0
    )
    for step_, losses in trained.record["holdout"].items():
        torch.testing.assert_close(
            torch.tensor(lean_run.record["holdout"][step_]), torch.tensor(losses), rtol=1e-3, atol=0
        )


def test_a_resumed_run_equals_an_unbroken_one(plan, cache_folder, tmp_path, lean_run):
    folder = tmp_path / "run"
    rungs = [Rung(plan.batch)]
    begun = train.begin(plan, folder, cache_folder, rungs=rungs)
    for _ in range(2):
        begun.update()
        begun.step += 1
    begun.save()
    run = train.begin(plan, folder, cache_folder, rungs=rungs)
    run.to_the_end()
    files = [checkpoint.find(place)[-1] / lora.FILE for place in (folder, lean_run.folder.out)]
    assert run.step == plan.steps and files[0].read_bytes() == files[1].read_bytes()


def out_of_memory(engine, calls):
    """The engine's `accumulate`, failing as CUDA does at these calls."""
    original, count = type(engine).accumulate, iter(range(1, 10**6))

    def accumulate(self, *args):
        if next(count) in calls:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has ...")
        return original(self, *args)

    return accumulate


def test_out_of_memory_switches_to_the_next_rung_and_the_result_stays_the_same(
    plan, cache_folder, tmp_path, lean_run, monkeypatch, capsys
):
    rungs = [Rung(plan.batch), Rung(plan.batch, recompute=3), Rung(1, recompute=100)]
    run = train.begin(plan, tmp_path, cache_folder, rungs=rungs)
    monkeypatch.setattr(lean.Lean, "accumulate", out_of_memory(run.engine, {4, 9}))  # in the second and fourth step
    before, make = weakref.ref(run.engine), fallback.make_engine

    def only_one(*args):
        nonlocal before
        assert before() is None  # two engines would hold the weights twice
        engine = make(*args)
        before = weakref.ref(engine)
        return engine

    monkeypatch.setattr(fallback, "make_engine", only_one)
    run.to_the_end()
    assert run.step == plan.steps == len(run.record["losses"])
    assert run.fallback.rungs == rungs[2:]
    said = capsys.readouterr().out
    assert "memory is full in step 2" in said and "memory is full in step 4" in said
    torch.testing.assert_close(
        torch.tensor(run.record["losses"]), torch.tensor(lean_run.record["losses"]), rtol=1e-4, atol=0
    )


def test_a_rung_whose_engine_does_not_fit_is_skipped(plan, cache_folder, tmp_path, monkeypatch):
    rungs = [Rung(plan.batch), Rung(plan.batch, recompute=3), Rung(1, recompute=100)]
    run = train.begin(plan, tmp_path, cache_folder, rungs=rungs)
    monkeypatch.setattr(lean.Lean, "accumulate", out_of_memory(run.engine, {1}))
    make = fallback.make_engine

    def full(unet, parameters, rung):
        if rung == rungs[1]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return make(unet, parameters, rung)

    monkeypatch.setattr(fallback, "make_engine", full)
    run.update()
    assert run.fallback.rungs == rungs[2:]


def test_releasing_the_graph_is_tried_only_once(plan, cache_folder, tmp_path, monkeypatch):
    run = train.begin(plan, tmp_path, cache_folder, rungs=[Rung(plan.batch), Rung(1, recompute=100)])
    first, tries = run.engine, []
    monkeypatch.setattr(first, "release", lambda: True)

    def full():
        tries.append(run.engine is first)
        if run.engine is first:
            raise RuntimeError("CUDA error: out of memory")

    run.fallback.run(full, 1)
    assert tries == [True, True, False]


def test_without_a_rung_left_the_error_says_so_and_the_checkpoint_is_kept(
    plan, cache_folder, tmp_path, monkeypatch
):
    run = train.begin(plan, tmp_path, cache_folder, rungs=[Rung(plan.batch)])
    monkeypatch.setattr(lean.Lean, "accumulate", out_of_memory(run.engine, set(range(5, 100))))
    with pytest.raises(RuntimeError, match="step 3 does not fit in the GPU's memory .CUDA out of memory.: close other"):
        run.to_the_end()
    assert [path.name for path in checkpoint.find(tmp_path)] == ["checkpoint-2"]


def test_the_plain_step_recomputes_too(plan, cache_folder, tmp_path, trained):
    rung = dataclasses.replace(Rung(plan.batch, lean=False), recompute=100)
    run = train.begin(plan, tmp_path, cache_folder, rungs=[rung])
    assert run.unet.is_gradient_checkpointing
    run.to_the_end()
    assert run.record["losses"] == trained.record["losses"]
