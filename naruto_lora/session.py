"""A session's bounds: interrupts that wait for a whole state, and how long what is left will take."""

from __future__ import annotations

import contextlib
import math
import signal
import statistics
import threading
import time

from .progress import duration

CALIBRATION = 5  # updates before a run says how long it will take


class Interrupted(Exception):
    """Someone asked the run to stop, and no state is half changed."""


class Interrupts:
    """While open, Ctrl-C, a kernel's interrupt and SIGTERM wait for a moment when no state is half changed.

    A second one does not wait: KeyboardInterrupt. Signals reach the main thread alone; elsewhere this does nothing.
    """

    def __init__(self):
        self.asked, self.safe, self.handlers = None, False, {}

    def __enter__(self):
        self.asked = None
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers[number] = signal.signal(number, self._caught)
        return self

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}

    def _caught(self, number, frame):
        if self.asked is not None:
            raise KeyboardInterrupt
        self.asked = number
        if self.safe:
            raise Interrupted

    def check(self) -> None:
        """Raises Interrupted if somebody asked."""
        if self.asked is not None:
            raise Interrupted

    @contextlib.contextmanager
    def at_once(self):
        """Inside, no state is changed: what comes need not wait."""
        self.check()
        self.safe = True
        try:
            yield
        finally:
            self.safe = False

    def pass_on(self) -> None:
        """Raises what the signal would have raised."""
        if self.asked == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)
        if self.asked is not None:
            raise KeyboardInterrupt


class Forecast:
    """Seconds to come, from those that were: the median update, the mean measurement and checkpoint.

    `begun` is when the session began (time.time()): `max_minutes` count from there.
    """

    def __init__(self, recipe, begun: float):
        self.recipe, self.begun, self.spent = recipe, begun, {"update": [], "measure": [], "save": []}

    def elapsed(self) -> float:
        """Seconds since the session began."""
        return time.time() - self.begun

    def budget_left(self) -> float:
        """Seconds of `max_minutes` that are left."""
        return (self.recipe.max_minutes * 60 or math.inf) - self.elapsed()

    def over_budget(self) -> bool:
        """Whether the next update would end past `max_minutes`; each session does at least one."""
        return self.update() > 0 and self.budget_left() < self.update() + self.mean("save")

    @contextlib.contextmanager
    def timed(self, what: str):
        begun = time.perf_counter()
        yield
        self.spent[what].append(time.perf_counter() - begun)

    def update(self) -> float:
        """Seconds of one update; 0.0 before the first."""
        return statistics.median(self.spent["update"][-20:] or [0.0])

    def mean(self, what: str) -> float:
        return statistics.fmean(self.spent[what] or [0.0])

    def seconds(self, start: int, stop: int) -> float | None:
        """From after `start` updates to after `stop`; None before there is enough to judge by."""
        if len(self.spent["update"]) < CALIBRATION:
            return None
        recipe, after = self.recipe, range(start + 1, stop + 1)
        measured = {k for k in after if k % recipe.measure_every == 0 or k == recipe.steps}
        saved = measured | {k for k in after if k % recipe.save_every == 0}
        return len(after) * self.update() + len(measured) * self.mean("measure") + len(saved) * self.mean("save")

    def sentence(self, at: int) -> str:
        """What is to come after `at` updates: each leg's end, the next checkpoint, and where `max_minutes` end."""
        ends = [leg.until for leg in self.recipe.legs if leg.until > at]
        text = ", ".join(f"step {end} in {duration(self.seconds(at, end))}" for end in ends)
        following = min(at - at % self.recipe.save_every + self.recipe.save_every, self.recipe.steps)
        text = f"{self.update():.3g} s a step: {text}; next checkpoint in {duration(self.seconds(at, following))}"
        left = self.budget_left()
        reached = [k for k in range(at, self.recipe.steps) if self.seconds(at, k) <= left]
        if len(reached) < self.recipe.steps - at:
            text += f"; the {self.recipe.max_minutes:g} minutes end near step {reached[-1]}"
        return text
