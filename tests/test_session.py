"""Interrupts that wait for a consistent state, and a forecast that adds up."""

import signal
import threading
import time

import pytest

from naruto_lora import session
from naruto_lora.recipe import Leg, Recipe


def plan(**changes):
    legs = (Leg(300, 1e-4), Leg(600, 3e-5, "cosine"))
    return Recipe("few", legs, precision="fp32", save_every=30, measure_every=90).replace(**changes)


NOW = 1000.0


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """time.monotonic() stands still."""
    monkeypatch.setattr(time, "monotonic", lambda: NOW)


def known(recipe, update=2.0, measure=10.0, save=1.0, begun=NOW):
    forecast = session.Forecast(recipe, begun)
    forecast.spent = {"update": [9.0] + [update] * 9, "measure": [measure], "save": [save, save]}
    return forecast


def test_the_forecast_counts_updates_measurements_and_checkpoints():
    forecast = known(plan())
    assert forecast.seconds(10, 29) == 19 * 2
    assert forecast.seconds(10, 30) == 20 * 2 + 1
    assert forecast.seconds(10, 90) == 80 * 2 + 3 * 1 + 10
    assert forecast.seconds(590, 600) == 10 * 2 + 1 + 10  # the last is measured, and saved once
    assert forecast.seconds(600, 600) == 0


def test_too_few_updates_give_no_forecast():
    forecast = session.Forecast(plan(), NOW)
    assert forecast.update() == 0.0 and forecast.mean("save") == 0.0
    for _ in range(session.CALIBRATION):
        assert forecast.seconds(0, 10) is None
        with forecast.timed("update"):
            pass
    assert forecast.seconds(0, 10) >= 0


def test_a_failed_update_is_not_timed():
    forecast = session.Forecast(plan(), NOW)
    with pytest.raises(RuntimeError), forecast.timed("update"):
        raise RuntimeError
    assert forecast.spent["update"] == []


def test_the_sentence_names_each_legs_end_and_the_next_checkpoint():
    text = known(plan()).sentence(5)
    assert text == "2 s a step: step 300 in 10 min 30 s, step 600 in 21 min 20 s; next checkpoint in 51 s"
    assert known(plan()).sentence(300).startswith("2 s a step: step 600 in 10 min 50 s; next")


def test_the_sentence_says_where_max_minutes_end():
    forecast = known(plan(max_minutes=5))
    assert forecast.sentence(5).endswith("; the 5 minutes end near step 148")
    assert forecast.seconds(5, 148) <= 300 < forecast.seconds(5, 149)
    later = known(plan(max_minutes=6), begun=NOW - 60)  # the time so far counts
    assert later.budget_left() == 300 and later.sentence(5).endswith("; the 6 minutes end near step 148")
    assert "end near" not in known(plan(max_minutes=60)).sentence(5)


def test_a_run_is_over_budget_if_an_update_and_its_checkpoint_would_end_too_late():
    assert known(plan(max_minutes=1), begun=NOW - 57.5).over_budget()  # 2.5 s are left for 2 s and 1 s
    assert not known(plan(max_minutes=1), begun=NOW - 57).over_budget()
    assert not known(plan(), begun=NOW - 10**6).over_budget()  # without max_minutes
    assert not session.Forecast(plan(max_minutes=1), NOW - 600).over_budget()  # each session does one update


def test_a_signal_waits_for_a_check_and_a_second_one_does_not():
    interrupts = session.Interrupts()
    with interrupts:
        interrupts.check()
        signal.raise_signal(signal.SIGINT)  # nothing happens yet
        with pytest.raises(session.Interrupted):
            interrupts.check()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        interrupts.raise_received()


def test_inside_immediate_a_signal_does_not_wait():
    interrupts = session.Interrupts()
    with interrupts, pytest.raises(session.Interrupted), interrupts.immediate():
        signal.raise_signal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        interrupts.raise_received()
    assert caught.value.code == 143


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_a_closed_terminal_is_heard_and_its_second_signal_breaks_no_save():
    interrupts = session.Interrupts()
    with interrupts:
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)  # from the kernel and from the shell
        with pytest.raises(session.Interrupted):
            interrupts.check()
    with pytest.raises(SystemExit) as caught:
        interrupts.raise_received()
    assert caught.value.code == 128 + signal.SIGHUP


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_a_signal_that_is_ignored_stays_so():
    """`nohup` starts a program with SIGHUP ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with session.Interrupts() as interrupts:
            signal.raise_signal(signal.SIGHUP)
            interrupts.check()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_handlers_are_restored_and_an_old_signal_is_forgotten():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    interrupts = session.Interrupts()
    for _ in range(2):
        with interrupts:
            interrupts.check()
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_outside_of_the_main_thread_signals_are_unchanged():
    before, seen = signal.getsignal(signal.SIGINT), []

    def work():
        with session.Interrupts() as interrupts:
            seen.append(signal.getsignal(signal.SIGINT))
            interrupts.check()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_measured_step_is_saved_whether_a_checkpoint_is_due_or_not():
    forecast = known(plan(save_every=70))
    assert forecast.seconds(80, 90) == 10 * 2 + 10 + 1
    assert forecast.seconds(130, 140) == 10 * 2 + 1


def test_the_forecast_uses_the_newest_updates():
    forecast = known(plan())
    forecast.spent["update"] = [9.0] * 30 + [2.0] * 20
    assert forecast.update() == 2


def test_immediate_ends_with_its_block_and_does_not_start_after_a_signal():
    interrupts = session.Interrupts()
    with interrupts:
        with interrupts.immediate():
            pass
        signal.raise_signal(signal.SIGINT)  # waits again
        with pytest.raises(session.Interrupted), interrupts.immediate():
            pytest.fail("the signal came before and was ignored")


CASES = [(1, 1, 9), (3, 4, 24), (3, 4, 25), (7, 5, 35), (4, 6, 30), (50, 60, 9)]


@pytest.mark.parametrize("save, measure, steps", CASES)
def test_the_forecast_in_arithmetic_equals_counting(save, measure, steps):
    forecast = known(plan(legs=(Leg(steps, 1e-4),), save_every=save, measure_every=measure))
    for start in range(steps + 1):
        for stop in range(start, steps + 1):
            measured = {k for k in range(start + 1, stop + 1) if k % measure == 0 or k == steps}
            saved = measured | {k for k in range(start + 1, stop + 1) if k % save == 0}
            assert forecast.seconds(start, stop) == (stop - start) * 2 + len(measured) * 10 + len(saved)


def test_ten_million_steps_are_forecast_at_once():
    forecast = known(plan(legs=(Leg(10**7, 1e-4),), max_minutes=60))
    begun = time.perf_counter()
    for _ in range(100):
        text = forecast.sentence(5)
    assert time.perf_counter() - begun < 0.5  # counted: hours
    found = int(text.split()[-1])
    assert forecast.seconds(5, found) <= 3600 < forecast.seconds(5, found + 1)


@pytest.mark.parametrize("late", [60, 60.5, 10**6])
def test_a_budget_that_is_past_at_the_forecast_ends_at_this_step(late):
    text = known(plan(max_minutes=1), begun=NOW - late).sentence(5)
    assert text.endswith("; the 1 minutes end near step 5")


def test_a_clock_that_is_put_back_changes_no_duration(monkeypatch):
    monkeypatch.setattr(time, "time", lambda: NOW - 7200)
    forecast = known(plan(max_minutes=1), begun=NOW - 30)
    assert forecast.elapsed() == 30 and forecast.budget_left() == 30


def test_an_interrupt_is_never_taken_for_a_failure():
    assert not issubclass(session.Interrupted, Exception)
