"""What every stage of pretraining shares: the clock, the record, and updates that run as CUDA graphs."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

SAVE_EVERY = 120.0  # seconds
Loss = Callable[..., dict[str, Tensor]]  # named inputs -> named scalars, the first of which is minimised


class Stop(Exception):
    """This process's minutes are used up and its state is saved: the same command goes on from there."""


def write_json(path: Path, data: dict) -> None:
    """Replace `path` in one step, so that a killed process leaves the old or the new file."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


class Record:
    """The work folder's log.json: seconds and figures of each stage, and the clock over all processes."""

    def __init__(self, work: Path, minutes: float | None, about: dict, finish: bool = False):
        self.path = work / "log.json"
        self.started = time.monotonic()
        self.end = self.started + 60 * minutes if minutes else math.inf
        self.data: dict = (
            json.loads(self.path.read_text(encoding="utf-8"))
            if self.path.exists()
            else {"seconds": 0.0, "stages": {}}
        )
        if self.data.get("settings", about["settings"]) != about["settings"]:
            raise ValueError(
                f"{work} holds a pretraining with other settings; give another --work or empty it"
            )
        self.before = self.data["seconds"]
        self.data |= about
        self.finish = finish

    def spent(self) -> float:
        """Seconds of the whole pretraining, earlier processes included."""
        return self.before + time.monotonic() - self.started

    def left(self) -> float:
        """Seconds left to this process."""
        return self.end - time.monotonic()

    def need(self, seconds: float) -> None:
        """Raises Stop if fewer seconds than these are left to this process."""
        if self.left() < seconds:
            raise Stop

    def say(self, text: str) -> None:
        print(f"[{self.spent():6.0f} s] {text}", flush=True)

    def note(self, stage: str, **figures) -> None:
        self.data["stages"].setdefault(stage, {}).update(figures)
        self.save()

    def get(self, stage: str, figure: str, default=None):
        return self.data["stages"].get(stage, {}).get(figure, default)

    def save(self) -> None:
        self.data["seconds"] = round(self.spent(), 1)
        write_json(self.path, self.data)

    @contextmanager
    def stage(self, name: str):
        """Adds the seconds inside to the stage's, however it ends, and marks it done if it ends well."""
        began = time.monotonic()
        before = self.get(name, "seconds", 0.0)
        try:
            yield
            self.note(name, done=True)
        finally:
            self.note(name, seconds=round(before + time.monotonic() - began, 1))
        self.say(f"{name}: done in {self.get(name, 'seconds'):.0f} s")


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 200 steps (a tenth of a short run), then a cosine that ends at 1% of the peak."""
    warm = min(1.0, (step + 1) / max(1, min(200, steps // 10)))
    return peak * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))


class Trainer:
    """AdamW with averaged weights; where there is CUDA a whole update is one graph for each input shape.

    Graphs share the gradients' memory: they are made once, here, and zeroed in place ever after.
    """

    def __init__(self, models: Iterable[nn.Module], say: Callable[[str], None] = print):
        self.parameters = [p for model in models for p in model.parameters()]
        self.device = self.parameters[0].device
        self.averages = [p.detach().clone() for p in self.parameters]
        self.rate = torch.zeros((), device=self.device)
        cuda = self.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=self.rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True, capturable=cuda
        )
        for p in self.parameters:
            p.grad = torch.zeros_like(p)
        self.gradients = [p.grad for p in self.parameters]
        self.step = 0
        self.routes: dict[str, tuple[dict[str, Tensor], Callable[[], Tensor]]] = {}
        self.names: list[str] = []
        self.say = say

    def _update(self, loss: Loss, inputs: dict[str, Tensor]) -> Tensor:
        torch._foreach_zero_(self.gradients)
        parts = loss(**inputs)
        self.names = [*parts, "gradient"]
        parts[self.names[0]].backward()
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(self.gradients)))
        torch._foreach_mul_(self.gradients, (1 / (norm + 1e-6)).clamp(max=1.0))
        self.optimizer.step()
        return torch.stack([*(part.detach().float() for part in parts.values()), norm])

    def _capture(self, loss: Loss, inputs: dict[str, Tensor]) -> Callable[[], Tensor]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._update(loss, inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            losses = self._update(loss, inputs)

        def replay() -> Tensor:
            graph.replay()
            return losses

        return replay

    def _milliseconds(self, run: Callable[[], Tensor], repeats: int) -> float:
        run()
        self._wait()
        began = time.perf_counter()
        for _ in range(repeats):
            run()
        self._wait()
        return (time.perf_counter() - began) / repeats * 1e3

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def prepare(self, key: str, inputs: dict[str, Tensor], ways: dict[str, Loss]) -> tuple[str, float]:
        """Make the update for inputs of these shapes by the fastest of `ways`; returns its name, ms a step.

        A way that cannot be compiled or captured, or answers otherwise than the first, is left out; if none
        is left, the first runs uncaptured.
        Call `reset` when all shapes are prepared: the trials here are updates at learning rate 0.
        """
        inputs = {name: tensor.clone() for name, tensor in inputs.items()}
        first = next(iter(ways.values()))
        if self.device.type != "cuda":
            self.routes[key] = inputs, lambda: self._update(first, inputs)
            return "plain", self._milliseconds(self.routes[key][1], 1)
        best = answer = None
        for name, loss in ways.items():
            began = time.perf_counter()
            try:
                run = self._capture(loss, inputs)
                found = self._milliseconds(run, 20), name, run
                answer = run().clone() if answer is None else answer
                torch.testing.assert_close(run(), answer, rtol=0.1, atol=1e-3)
            except Exception as error:  # compilers and captures fail in many ways
                self.say(f"{key}: '{name}' left out: {type(error).__name__}: {str(error)[:300]}")
                continue
            self.say(
                f"{key}: '{name}' takes {found[0]:.2f} ms a step, in {time.perf_counter() - began:.0f} s"
            )
            best = found if best is None or found[0] < best[0] else best
        if best is None:
            run = lambda: self._update(first, inputs)  # noqa: E731
            best = self._milliseconds(run, 5), "uncaptured", run
        self.routes[key] = inputs, best[2]
        return best[1], best[0]

    @torch.no_grad()
    def reset(self, weights: list[Tensor]) -> None:
        """Start from these weights, with no moments."""
        self.step = 0
        torch._foreach_copy_(self.parameters, weights)
        torch._foreach_copy_(self.averages, weights)
        for moments in self.optimizer.state.values():
            torch._foreach_zero_(list(moments.values()))

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.parameters]

    def save(self, path: Path) -> None:
        """Everything that the next step depends on, in one file, replaced in one step."""
        moments = [[v.cpu() for v in self.optimizer.state[p].values()] for p in self.parameters]
        state = {
            "step": self.step,
            "weights": [w.cpu() for w in self.weights()],
            "averages": [a.cpu() for a in self.averages],
            "moments": moments,
        }
        part = path.with_name(path.name + ".part")
        torch.save(state, part)
        part.replace(path)

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Go on from a saved state, in the memory that the graphs know. All shapes must be prepared."""
        state = torch.load(path, map_location=self.device)
        self.step = state["step"]
        torch._foreach_copy_(self.parameters, state["weights"])
        torch._foreach_copy_(self.averages, state["averages"])
        for p, saved in zip(self.parameters, state["moments"], strict=True):
            for mine, value in zip(self.optimizer.state[p].values(), saved, strict=True):
                mine.copy_(value)

    @torch.no_grad()
    def update(self, key: str, inputs: dict[str, Tensor], rate: float) -> Tensor:
        """One step; returns the losses as a tensor that the next step overwrites."""
        static, run = self.routes[key]
        for name, tensor in inputs.items():
            static[name].copy_(tensor)
        self.rate.fill_(rate)
        with torch.enable_grad():
            losses = run()
        keep = min(0.999, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.averages, self.parameters, 1 - keep)
        self.step += 1
        return losses

    @torch.no_grad()
    def use_averages(self) -> None:
        torch._foreach_copy_(self.parameters, self.averages)


def plan(record: Record, stage: str, given: int | None, seconds: float, ms: float, done: int = 0) -> int:
    """The stage's number of steps: as given, or what fits into `seconds` at `ms` each. Kept in the record.

    A plan made by an earlier process is kept if its rest fits into `seconds`, and cut if it does not.
    """
    fits = done + max(1, int(seconds * 1e3 / ms))
    kept = record.get(stage, "steps")
    steps = given or (min(kept, fits) if kept else fits)
    record.note(stage, steps=steps)
    return steps


def train(
    trainer: Trainer, record: Record, stage: str, steps: int, peak: float, batch, path: Path | None = None
) -> None:
    """Update until `steps`; `batch(step)` gives the route's key and its inputs.

    With a `path` the state is saved there now and then, and when the process's minutes are over. Raises Stop
    then, and FloatingPointError if the loss or a gradient is not finite.
    """
    losses, every, total = record.get(stage, "losses", []), max(1, steps // 40), 0.0
    since, saved = trainer.step, record.spent()
    while trainer.step < steps:
        if path and record.left() <= 0:
            trainer.save(path)
            record.say(f"{stage}: stopped at step {trainer.step} of {steps}")
            raise Stop
        now = learning_rate(trainer.step, steps, peak)
        total = total + trainer.update(*batch(trainer.step), now)
        if trainer.step % every and trainer.step < steps:
            continue
        means = (total / (trainer.step - since)).tolist()
        named = {name: round(v, 5) for name, v in zip(trainer.names, means, strict=True)}
        if not math.isfinite(sum(means)):
            raise FloatingPointError(f"{stage}: the loss is {named} before step {trainer.step}")
        losses.append({"step": trainer.step} | named)
        record.note(stage, losses=losses)
        record.say(f"{stage} {trainer.step}/{steps} " + " ".join(f"{k} {v:.4f}" for k, v in named.items()))
        total, since = 0.0, trainer.step
        if path and record.spent() - saved > SAVE_EVERY:
            trainer.save(path)
            saved = record.spent()


def seeded(generator: torch.Generator, seed: int, stage: int, step: int) -> torch.Generator:
    """Make what `generator` draws next depend on these three alone."""
    return generator.manual_seed((seed * 16 + stage) * 10**8 + step)
