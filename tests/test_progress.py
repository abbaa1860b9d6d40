"""Progress of long calls: in a log, a terminal and a saved notebook."""

import io
import json
import re
import sys
from pathlib import Path

import pytest

from naruto_lora import progress, session

ROOT = Path(__file__).parents[1]


def test_progress_without_a_terminal_is_a_few_lines(capsys):
    show = progress.Progress()
    for k in range(1, 101):
        show("pictures", k, 100)
    for k in range(1, 701):
        show("training", k, 700, loss=1.0 if k == 1 else 0.5, lr=1e-4, grad_norm=1.0, peak_gib=None)
    lines = capsys.readouterr().out.splitlines()
    assert 2 <= len(lines) <= 4 and not any("\r" in line or "\x1b" in line for line in lines)
    assert "pictures" in lines[0] and "100/100" in lines[1] and "took" in lines[1]
    assert "700/700" in lines[-1] and "loss 0.5000  learning rate 0.0001" in lines[-1] and "GiB" not in lines[-1]


def test_progress_smooths_the_loss_and_shows_the_time_left(capsys, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    show = progress.Progress(every=0)
    for k, loss in ((5, 1.0), (6, 2.0), (10, 2.0)):  # resumed at 4: the first call's duration is unknown
        show("training", k, 20, loss=loss, lr=1e-4, peak_gib=12.34)
        clock[0] += 10
    lines = capsys.readouterr().out.splitlines()
    assert "left" not in lines[0] and "5/20" in lines[0] and "12.3 GiB" in lines[0]
    assert "loss 1.1000" in lines[1] and "2 min 20 s left" in lines[1]  # 10 s a step, 14 to go
    assert "loss 1.1900" in lines[2] and "40 s left" in lines[2]  # 20 s for 5 steps, 10 to go


def test_a_phase_that_starts_again_restarts_its_clock_and_an_interrupted_one_does_not(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    show = progress.Progress(every=0)
    for phase, done in (("training", 1), ("hold-out", 1), ("hold-out", 4), ("training", 2), ("hold-out", 1),
                        ("hold-out", 2)):
        show(phase, done, 4)
        clock[0] += 10
    lines = capsys.readouterr().out.splitlines()
    assert "1 min 00 s left" in lines[3]  # 30 s for the second step, 2 to go
    assert "left" not in lines[4] and "2/4  20 s left" in lines[5]  # 10 s for one picture, 2 to go


FIGURES = dict(loss=1.0, lr=1e-4, grad_norm=1.0, images_per_second=1.234, peak_gib=12.34)


def test_progress_shows_the_figures_of_a_step_and_the_runs_own_estimate(capsys):
    show = progress.Progress(every=0)
    show("training", 5, 20, **FIGURES, left=None)
    show("training", 6, 20, **FIGURES, left=65)
    line = capsys.readouterr().out.splitlines()[1]
    for part in ("1 min 05 s left", "loss 1.0000", "learning rate 0.0001", "1.23 images/s", "peak 12.3 GiB"):
        assert part in line


class Terminal(io.StringIO):
    def isatty(self):
        return True


def in_a_terminal(monkeypatch, columns):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", str(columns))
    return terminal


def screen(text):
    """The lines that a terminal shows after `text`."""
    lines = [""]
    for part in re.split("(\n|\r\x1b\\[K)", text):
        lines = [*lines, ""] if part == "\n" else [*lines[:-1], ""] if part.startswith("\r") else [
            *lines[:-1], lines[-1] + part]
    return lines


@pytest.mark.parametrize("columns", [5, 40, 80, 200])
def test_in_a_terminal_one_line_is_rewritten_and_never_wider(monkeypatch, columns):
    terminal, show = in_a_terminal(monkeypatch, columns), progress.Progress(every=0)
    for k in (1, 2, 3):
        show("training", k, 3, **FIGURES, left=10)
    assert terminal.getvalue().count("\n") == 1
    rewritten = re.split("\r\x1b\\[K", terminal.getvalue())[1:]
    assert all(len(line.strip()) < columns for line in rewritten)
    assert ("peak 12.3 GiB" in rewritten[-1]) == (columns == 200)
    if columns == 80:
        assert re.search(r"(loss 1.0000|learning rate 0.0001|images/s)$", rewritten[-1].strip())  # no cut figure


def test_a_note_in_a_terminal_is_shown_at_once_above_the_line(monkeypatch):
    terminal, show = in_a_terminal(monkeypatch, 80), progress.Progress(every=1000)
    show.note("resumes from checkpoint-120")
    show("drawing", 1, 2)
    show.note("a warning")
    lines = screen(terminal.getvalue())
    assert lines[:2] == ["resumes from checkpoint-120", "a warning"] and "1/2" in lines[2] and len(lines) == 3
    show("drawing", 2, 2)
    show.note("the end")
    lines = screen(terminal.getvalue())
    assert "2/2" in lines[2] and lines[3:] == ["the end", ""]


def test_a_note_in_a_log_is_a_line_at_once(capsys):
    show = progress.Progress()
    show("training", 1, 9, **FIGURES)
    show("training", 2, 9, **FIGURES)
    show.note("stopped at step 2")
    assert [line[:7] for line in capsys.readouterr().out.splitlines()] == ["trainin", "stopped"]


@pytest.mark.parametrize(
    "seconds, text", [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")]
)
def test_durations(seconds, text):
    assert progress.duration(seconds) == text


def test_a_saved_notebook_keeps_each_phases_last_state_and_the_notes():
    """In a real kernel: one display per cell, also if several cells share one Progress."""
    import nbformat
    from nbclient import NotebookClient

    first = (
        "from naruto_lora.progress import Progress\nshow = Progress(every=0)\nshow.note('resumes <b>')\n"
        "for phase in ('captions', 'training', 'hold-out'):\n    for k in range(1, 6):\n        show(phase, k, 9)\n"
        "show('training', 6, 9)"
    )
    second = "show.every = 1000\nshow('hold-out', 1, 9)\nshow('hold-out', 2, 9)\nshow.note('ended')"
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in (first, second)])
    NotebookClient(book, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    kept = [cell.outputs for cell in book.cells]
    assert [[output.output_type for output in outputs] for outputs in kept] == [["display_data"]] * 2
    plain = [outputs[0].data["text/plain"].splitlines() for outputs in kept]
    assert [line.split("  ")[0] for line in plain[0]] == ["resumes <b>", "captions", "training", "hold-out"]
    assert "6/9" in plain[0][2] and "5/9" in plain[0][3]
    assert "1/9" in plain[1][0] and plain[1][1] == "ended"
    shown = kept[0][0].data["text/html"]
    assert "resumes &lt;b&gt;" in shown and shown.count("<progress") == 3
    assert "color" not in shown and "background" not in shown  # the theme's own
    assert "widget" not in json.dumps(book)


def test_a_note_goes_to_the_display_or_is_printed(capsys):
    notes = []
    progress.note(type("Show", (), {"note": staticmethod(notes.append)})(), "one")
    progress.note(None, "two")
    progress.note(print, "three")
    assert notes == ["one"] and capsys.readouterr().out == "two\nthree\n"


def test_a_listener_can_always_be_called_and_drops_repeated_messages(capsys):
    listener = progress.Listener()
    listener("training", 1, 2, loss=0.5)  # there is no `show`
    listener.once("the mirror is full")
    listener.once("the mirror is full")
    listener.note("the mirror is full")
    assert capsys.readouterr().out == 2 * "the mirror is full\n"
    shown, notes = [], []

    def show(*arguments, **figures):
        shown.append((arguments, figures))

    show.note = notes.append
    listener = progress.Listener(show)
    listener("training", 1, 2, loss=0.5)
    listener.once("slower")
    assert shown == [(("training", 1, 2), {"loss": 0.5})] and notes == ["slower"]


@pytest.mark.parametrize("encoding, word", [("ascii", "na\\xefve"), ("latin-1", "naïve"), ("cp1252", "naïve")])
def test_letters_that_the_output_lacks_are_replaced(monkeypatch, encoding, word):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    progress.Progress(every=0)("training", 1, 2)
    progress.note(None, "naïve \u2603 \udce9")
    progress.Progress().note("naïve")
    lines = written.getvalue().decode(encoding).splitlines()
    assert lines == [f"training   {'#' * 10}{'-' * 10} 1/2", f"{word} \\u2603 \\udce9", word]


def test_a_message_is_one_line_without_letters_that_steer_a_terminal(capsys):
    name = "a\x1b[2J\x9b31m\n\r\u202efdp\x07é 漢.png"
    plain, notes = "a [2J 31m   fdp é 漢.png", []
    progress.note(None, name)
    progress.Listener().note(name)
    progress.note(type("Show", (), {"note": staticmethod(notes.append)}), name)
    assert capsys.readouterr().out == f"{plain}\n{plain}\n" and notes == [plain]


class Broken(io.StringIO):
    """An output that fails."""

    def __init__(self, error, terminal):
        super().__init__()
        self.error, self.isatty = error, lambda: terminal

    def write(self, text):
        raise self.error


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), BrokenPipeError(32, "Broken pipe"),
                                   ValueError("I/O operation on closed file"), UnicodeError("odd")])
def test_an_output_that_fails_is_passed_over(monkeypatch, error, terminal):
    monkeypatch.setattr(sys, "stdout", Broken(error, terminal))
    show = progress.Progress(every=0)
    show("training", 1, 2)
    show.note("one")
    progress.note(None, "two")
    assert show.phases["training"].done == 1


def test_a_show_that_fails_ends_nothing_and_is_said_once(capsys):
    def show(phase, done, total, **figures):
        raise (BrokenPipeError, TypeError)[done - 1](f"number {done}")

    listener = progress.Listener(show)
    listener("training", 1, 2)
    listener("training", 2, 2)
    assert str(listener.error) == "number 1" and isinstance(listener.error, BrokenPipeError)
    said = capsys.readouterr()
    assert said.err == "progress can't be shown (BrokenPipeError: number 1); the run continues\n" and said.out == ""
    show.note = lambda text: 1 / 0
    listener.note("passed over too")


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, session.Interrupted])
def test_an_interrupt_in_a_show_is_no_failure(stop):
    def show(*_):
        raise stop

    with pytest.raises(stop):
        progress.Listener(show)("training", 1, 2)


def test_a_message_can_be_said_once_for_what_it_is_about(capsys):
    listener = progress.Listener()
    for step in (2, 4):
        listener.once(f"the mirror is full, step {step} is safe there", "full")
    assert capsys.readouterr().out == "the mirror is full, step 2 is safe there\n"


def test_the_first_line_is_shown_also_just_after_the_machine_started(capsys, monkeypatch):
    monkeypatch.setattr(progress.time, "monotonic", lambda: 3.0)
    progress.Progress()("training", 1, 2)
    assert "1/2" in capsys.readouterr().out
