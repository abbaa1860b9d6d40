"""One session of a run: interrupts that wait until a checkpoint can be saved, and a forecast of the time left."""

from __future__ import annotations

import bisect
import contextlib
import math
import signal
import statistics
import threading
import time

from .progress import duration

CALIBRATION = 5  # updates before the first forecast
SIGNALS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]  # Windows: two


class Interrupted(BaseException):  # so that no `except Exception` takes it for a failure
    """The user interrupted the run, at a moment when its state is consistent."""


class Interrupts:
    """A context in which Ctrl-C, a kernel's interrupt, SIGTERM and SIGHUP (a closed terminal) wait for a whole state.

    A second one does not wait: KeyboardInterrupt. Outside of the main thread, which gets the signals, it does nothing;
    one that is ignored, as under nohup, stays so.
    """

    def __init__(self):
        self.received, self.waits, self.handlers = None, True, {}  # the signal that came

    def __enter__(self):
        self.received = None
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
            self.handlers = {number: signal.signal(number, self._caught) for number in heard}
        return self

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}

    def _caught(self, number, frame):
        if self.received is not None and number != getattr(signal, "SIGHUP", 0):  # that can come twice
            raise KeyboardInterrupt
        self.received = self.received or number
        if not self.waits:
            raise Interrupted

    def check(self) -> None:
        """Raises Interrupted if a signal came."""
        if self.received is not None:
            raise Interrupted

    @contextlib.contextmanager
    def immediate(self):
        """A context for code that changes no state: inside, a signal raises Interrupted immediately."""
        self.check()
        self.waits = False
        try:
            yield
        finally:
            self.waits = True

    def raise_received(self) -> None:
        """Raises KeyboardInterrupt or SystemExit, as the signal would have done without this."""
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is not None:
            raise SystemExit(128 + self.received)


class Forecast:
    """The time left, from the median update and the mean measurement and checkpoint so far.

    `begun` is the time.monotonic() of the session's start: `max_minutes` count from there.
    """

    def __init__(self, recipe, begun: float):
        self.recipe, self.begun, self.spent = recipe, begun, {"update": list[float](), "measure": [], "save": []}

    def elapsed(self) -> float:
        """Seconds since the session began."""
        return time.monotonic() - self.begun

    def budget_left(self) -> float:
        """Seconds left of `max_minutes`."""
        return (self.recipe.max_minutes * 60 or math.inf) - self.elapsed()

    def over_budget(self) -> bool:
        """Whether the next update would end after `max_minutes`; each session does at least one."""
        return self.update() > 0 and self.budget_left() < self.update() + self.mean("save")

    @contextlib.contextmanager
    def timed(self, what: str):
        """A context whose seconds count as "update", "measure" or "save", unless it raises."""
        begun = time.perf_counter()
        yield
        self.spent[what].append(time.perf_counter() - begun)

    def update(self) -> float:
        """Seconds of one update; 0.0 before the first."""
        return statistics.median(self.spent["update"][-20:] or [0.0])

    def mean(self, what: str) -> float:
        return statistics.fmean(self.spent[what] or [0.0])

    def seconds(self, start: int, stop: int) -> float | None:
        """Seconds from `start` finished updates to `stop`; None before CALIBRATION updates were timed."""
        return self._seconds(start, stop) if len(self.spent["update"]) >= CALIBRATION else None

    def _seconds(self, start: int, stop: int) -> float:
        measure, save, last = self.recipe.measure_every, self.recipe.save_every, start < self.recipe.steps <= stop
        # how often each is due; the last step is measured and saved anyway, a measured one is saved too
        every = measure, save, math.lcm(measure, save)
        measured, saved, both = (last + (stop - last) // n - start // n for n in every)
        saved += measured - both
        return (stop - start) * self.update() + measured * self.mean("measure") + saved * self.mean("save")

    def sentence(self, at: int) -> str:
        """When, after `at` updates, each leg ends and the next checkpoint comes, and where `max_minutes` end."""
        ends = [leg.until for leg in self.recipe.legs if leg.until > at]
        text = ", ".join(f"step {end} in {duration(self._seconds(at, end))}" for end in ends)
        following = min(at - at % self.recipe.save_every + self.recipe.save_every, self.recipe.steps)
        text = f"{self.update():.3g} s a step: {text}; next checkpoint in {duration(self._seconds(at, following))}"
        steps = range(at, self.recipe.steps)
        reached = bisect.bisect_right(steps, self.budget_left(), key=lambda k: self._seconds(at, k))
        if reached < len(steps):
            text += f"; the {self.recipe.max_minutes:g} minutes end near step {max(at, at + reached - 1)}"
        return text
