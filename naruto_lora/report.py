"""What a person sees of a run: progress, curves, tables. And what a program reads: JSON."""

from __future__ import annotations

import html
import json
import sys
import time
from dataclasses import asdict, is_dataclass
from pathlib import Path


class Progress:
    """The `show` of long calls: one line that is rewritten, in a notebook or a terminal; else a line now and then.

    Nothing but the last state of each phase stays in a saved notebook.
    """

    def __init__(self, every: float | None = None):
        self.every = every if every is not None else (1.0 if _watched() else 30.0)  # seconds
        self.phase, self.begun, self.first, self.shown = None, 0.0, 0, 0.0
        self.smooth = self.handle = None  # of the phase that is shown

    def __call__(self, phase: str, done: int, total: int, **figures) -> None:
        now = time.time()
        if phase != self.phase:
            self.phase, self.begun, self.first, self.shown = phase, now, done, 0.0
            self.smooth = self.handle = None
        if "loss" in figures:
            old = self.smooth if self.smooth is not None else figures["loss"]
            figures["loss"] = self.smooth = 0.9 * old + 0.1 * figures["loss"]
        if now - self.shown >= self.every or done == total:
            self.shown = now
            self._write(self._line(done, total, now, figures), done == total)
        if done == total:
            self.phase = None  # the next call, if of the same phase, starts a line of its own

    def _line(self, done: int, total: int, now: float, figures: dict) -> str:
        filled = round(20 * done / total) if total else 20
        line = f"{self.phase:<10} {'█' * filled}{'░' * (20 - filled)} {done}/{total}"
        if "loss" in figures:
            line += f"  loss {figures['loss']:.4f}  learning rate {figures['lr']:.2g}"
        if figures.get("peak_gib"):
            line += f"  {figures['peak_gib']:.1f} GiB"
        if done > self.first:
            left = (now - self.begun) / (done - self.first) * (total - done)
            line += f"  {duration(left)} left" if done < total else f"  took {duration(now - self.begun)}"
        return line

    def _write(self, line: str, last: bool) -> None:
        if _in_notebook():
            self._display(line)
        elif sys.stdout.isatty():
            print(f"\r\033[K{line}", end="\n" if last else "", flush=True)
        else:
            print(line, flush=True)

    def _display(self, line: str) -> None:
        from IPython.display import HTML, display

        shown = HTML(f"<pre style='margin:0'>{html.escape(line)}</pre>")
        if self.handle is None:
            self.handle = display(shown, display_id=True)
        else:
            self.handle.update(shown)


def _in_notebook() -> bool:
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    shell = get_ipython()
    return shell is not None and hasattr(shell, "kernel")


def _watched() -> bool:
    return _in_notebook() or sys.stdout.isatty()


def duration(seconds: float) -> str:
    """'8 s', '3 min 05 s' or '2 h 10 min'."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def curves(records: dict[str, dict], smoothing: int = 20):
    """Training loss (smoothed) and hold-out loss by step of each named run's record, as one PIL picture."""
    import io

    import numpy as np
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(7.5, 3.2), dpi=110, layout="constrained")
    axes = figure.subplots()
    for number, (name, record) in enumerate(records.items()):
        losses = np.asarray(record["losses"])
        width = max(1, min(smoothing, len(losses)))
        smooth = np.convolve(losses, np.ones(width) / width, "valid")
        axes.plot(np.arange(width, len(losses) + 1), smooth, color=f"C{number}", label=f"{name}: training")
        held = {int(k): float(np.mean(v)) for k, v in record["holdout"].items()}
        if held:
            axes.plot(list(held), list(held.values()), "o--", color=f"C{number}", label=f"{name}: hold-out")
    axes.set(xlabel="step", ylabel="denoising loss", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer)


def gain(record: dict):
    """A run's hold-out loss before and after as a table, the gain in pairs; a sentence if nothing was held out."""
    from . import metrics

    losses = list(record["holdout"].values())
    if not losses:
        return "No picture was held out of training (holdout is 0), so there is nothing to measure by."
    return table([
        {"": "base", "hold-out loss": metrics.mean(losses[0])},
        {"": "LoRA", "hold-out loss": metrics.mean(losses[-1])},
        {"": "gain", "hold-out loss": metrics.paired(losses[0], losses[-1])},
    ])


def table(rows: list[dict]):
    """Rows of one shape as a small HTML table (with plain text beside it) that a notebook displays."""
    return _Table(rows)


class _Table:
    def __init__(self, rows: list[dict]):
        self.rows = [{key: str(value) for key, value in row.items()} for row in rows]

    def __repr__(self) -> str:
        names = list(self.rows[0])
        widths = [max(len(n), *(len(row[n]) for row in self.rows)) for n in names]
        lines = [names] + [[row[n] for n in names] for row in self.rows]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)

    def _repr_html_(self) -> str:
        head = "".join(f"<th style='text-align:left'>{html.escape(name)}</th>" for name in self.rows[0])
        cells = [[f"<td style='text-align:left'>{html.escape(v)}</td>" for v in row.values()] for row in self.rows]
        body = "".join(f"<tr>{''.join(row)}</tr>" for row in cells)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def write_json(path: str | Path, content: dict) -> Path:
    """Writes `content` (figures included) as JSON; makes the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, default=_plain), encoding="utf-8")
    return path


def _plain(value):
    if is_dataclass(value):
        return asdict(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    return str(value)


def read_json(path: str | Path) -> dict:
    return json.loads(Path(path).read_text(encoding="utf-8"))
