"""The progress of long calls: one line per phase, in a notebook, a terminal or a log.

Long calls have a parameter `show`: a function `show(phase, done, total, **figures)` that they call often. It can have
a method `show.note(text)` for messages that stay. `Progress` is one; None shows no progress and prints the notes.
"""

from __future__ import annotations

import contextlib
import html
import shutil
import sys
import time
from dataclasses import dataclass


def note(show, text: str) -> None:
    """Passes a message to `show.note` if there is one, else prints it; in `plain` letters."""
    getattr(show, "note", _print)(plain(text))


def plain(text: str) -> str:
    """`text` on one line, without letters that steer a terminal or turn the direction of writing."""
    return "".join(c if c.isprintable() or "\ud800" <= c <= "\udfff" else " " for c in text)  # half a letter is escaped


class Listener:
    """Wraps any `show`, also None: it can always be called, and its failure ends nothing; `error` is the first one."""

    def __init__(self, show=None):
        self.show, self.noted, self.error = show, set(), None

    def __call__(self, phase: str, done: int, total: int, **figures) -> None:
        if self.show:
            self._try(self.show, phase, done, total, **figures)

    def note(self, text: str) -> None:
        self._try(note, self.show, text)

    def once(self, text: str, about: str | None = None) -> None:
        """`note`, but only the first time for each text, or for each `about`."""
        if (about or text) not in self.noted:
            self.noted.add(about or text)
            self.note(text)

    def _try(self, tell, *arguments, **figures) -> None:
        try:
            tell(*arguments, **figures)
        except Exception as error:  # a closed pipe, a full disk: no reason to end hours of training
            if self.error is None:
                _print(f"progress can't be shown ({type(error).__name__}: {error}); the run continues", sys.stderr)
            self.error = self.error or error


class Progress:
    """A `show` with one line per phase, rewritten in place; in a log, a new plain line every 30 seconds.

    In a notebook, all lines and notes of a cell are one display: a saved notebook keeps the notes and the last state
    of each phase. In a terminal, lines are cut to its width.
    """

    def __init__(self, every: float | None = None):
        self.every = every if every is not None else (1.0 if _in_notebook() or sys.stdout.isatty() else 30.0)  # seconds
        self.phases, self.blocks = dict[str, _Phase](), dict[str, tuple]()  # by phase; blocks has the notes too
        self.cell = self.handle = None
        self.line = ""  # the unfinished line in a terminal

    def __call__(self, phase: str, done: int, total: int, **figures) -> None:
        self._enter_cell()
        now, state = time.monotonic(), self.phases.get(phase)
        if state is None or done <= state.done:  # a new phase, or one that starts again
            state = self.phases[phase] = _Phase(begun=now, first=done)
        state.done = done
        if "loss" in figures:
            old = state.smooth if state.smooth is not None else figures["loss"]
            figures["loss"] = state.smooth = 0.9 * old + 0.1 * figures["loss"]
        if now - state.shown >= self.every or done == total:
            state.shown = now
            self._write(phase, done, total, _texts(done, total, now, state, figures))

    def note(self, text: str) -> None:
        """Shows a message that stays."""
        self._enter_cell()
        if _in_notebook():
            self.blocks[f"note {len(self.blocks)}"] = (text, f"<div>{html.escape(text)}</div>")
            self._display()
        elif sys.stdout.isatty():
            _print(f"\r\033[K{text}\n{self.line}", end="")
        else:
            _print(text)

    def _write(self, phase: str, done: int, total: int, texts: list[str]) -> None:
        if _in_notebook():
            self.blocks[phase] = ("  ".join([phase, *texts]), _bar_html(phase, done, total, texts))
            self._display()
        elif sys.stdout.isatty():
            width = shutil.get_terminal_size().columns - 1
            line = _cut(_bar(phase, done, total, texts, 20 if width >= 110 else 10), width)
            self.line = "" if done == total else line
            _print(f"\r\033[K{line}", end="\n" if done == total else "")
        else:
            _print(_bar(phase, done, total, texts))

    def _enter_cell(self) -> None:
        """Starts a new display and new phases if another notebook cell runs than at the last call."""
        if not _in_notebook():
            return
        cell = sys.modules["IPython"].get_ipython().execution_count
        if cell != self.cell:
            self.cell, self.phases, self.blocks, self.handle = cell, {}, {}, None

    def _display(self) -> None:
        from IPython.display import display

        plain, shown = zip(*self.blocks.values(), strict=True)
        bundle = {"text/plain": "\n".join(plain), "text/html": f"<div style='line-height:1.6'>{''.join(shown)}</div>"}
        if self.handle is None:
            self.handle = display(bundle, raw=True, display_id=True)
        else:
            self.handle.update(bundle, raw=True)


@dataclass
class _Phase:
    begun: float  # time.monotonic()
    first: int  # `done` of the first call, whose duration is unknown
    done: int = 0
    shown: float = float("-inf")
    smooth: float | None = None


def _texts(done: int, total: int, now: float, state: _Phase, figures: dict) -> list[str]:
    """The texts beside the bar, the most important first."""
    texts, left = [f"{done}/{total}"], figures.get("left")
    if left is None and done > state.first:
        left = (now - state.begun) / (done - state.first) * (total - done)
    if done == total and done > state.first:
        texts.append(f"took {duration(now - state.begun)}")
    elif done < total and left is not None:
        texts.append(f"{duration(left)} left")
    if "loss" in figures:
        texts += [f"loss {figures['loss']:.4f}", f"learning rate {figures['lr']:.2g}"]
    if figures.get("holdout"):
        texts.append(f"hold-out {figures['holdout']:.4f}")
    if figures.get("images_per_second"):
        texts.append(f"{figures['images_per_second']:.3g} images/s")
    if figures.get("peak_gib"):
        texts.append(f"peak {figures['peak_gib']:.1f} GiB")
    return texts


def _bar(phase: str, done: int, total: int, texts: list[str], width: int = 20) -> str:
    filled = round(width * done / total) if total else width
    return "  ".join([f"{phase:<10} {'█' * filled}{'░' * (width - filled)} {texts[0]}", *texts[1:]])


def _print(text: str, file=None, end: str = "\n") -> None:
    """Prints `text` in letters that the output has; if it is closed or its disk is full, nothing happens."""
    file = file or sys.stdout
    encoding = getattr(file, "encoding", None) or "utf-8"
    with contextlib.suppress(OSError, ValueError):  # ValueError: closed
        text = text if "█".encode(encoding, "ignore") else text.replace("█", "#").replace("░", "-")
        print(text.encode(encoding, "backslashreplace").decode(encoding), end=end, file=file, flush=True)


def _cut(line: str, width: int) -> str:
    """`line` in at most `width` characters, cut between two figures if possible."""
    if len(line) <= width:
        return line
    return line[: width + 1].rpartition("  ")[0].rstrip()[:width] or line[:width]


def _bar_html(phase: str, done: int, total: int, texts: list[str]) -> str:
    """The browser's own progress bar, without colours of ours: it fits light and dark themes."""
    figures = " ".join(f"<span style='white-space:nowrap;margin-right:0.6em'>{html.escape(t)}</span>" for t in texts)
    return (
        f"<div style='display:flex;flex-wrap:wrap;gap:0 0.8em;font-variant-numeric:tabular-nums'>"
        f"<span style='min-width:5em'>{html.escape(phase)}</span>"
        f"<progress value='{done if total else 1}' max='{total or 1}' style='width:12em;height:1.6em'></progress>"
        f"<span style='flex:1;min-width:12em'>{figures}</span></div>"
    )


def _in_notebook() -> bool:
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel")


def duration(seconds: float) -> str:
    """'8 s', '3 min 05 s' or '2 h 10 min'."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
