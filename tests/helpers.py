"""Helpers of several tests: a display that records, a stop after a step, a comparison of LoRA files."""

from naruto_lora import lora


def same_adapter(one, two):
    return (one / lora.FILE).read_bytes() == (two / lora.FILE).read_bytes()


class Stop(BaseException):
    """Stands for a disconnection, after which nothing is saved; `show` raises it."""


def stop_after(steps):
    def show(phase, done, total, **figures):
        if phase == "training" and done == steps:
            raise Stop

    return show


class Watcher:
    """A display that records its calls and notes, and calls `act` with the step of each update."""

    def __init__(self, act=lambda step: None):
        self.seen, self.notes, self.act = [], [], act

    def __call__(self, phase, done, total, **figures):
        self.seen.append((phase, done, total, figures))
        if phase == "training":
            self.act(done)

    def note(self, text):
        self.notes.append(text)

    @property
    def steps(self):
        return [done for phase, done, *_ in self.seen if phase == "training"]
