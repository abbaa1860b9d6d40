"""What a person sees of a run, and what a program reads."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from naruto_lora import metrics, report

ROOT = Path(__file__).parents[1]


def test_progress_without_a_terminal_is_a_few_lines(capsys):
    show = report.Progress()
    for k in range(1, 101):
        show("pictures", k, 100)
    for k in range(1, 701):
        show("training", k, 700, loss=1.0 if k == 1 else 0.5, lr=1e-4, grad_norm=1.0, peak_gib=None)
    lines = capsys.readouterr().out.splitlines()
    assert 2 <= len(lines) <= 4 and not any("\r" in line or "\x1b" in line for line in lines)
    assert "pictures" in lines[0] and "100/100" in lines[1] and "took" in lines[1]
    assert "700/700" in lines[-1] and "loss 0.5000  learning rate 0.0001" in lines[-1] and "GiB" not in lines[-1]


def test_progress_smooths_the_loss_and_tells_the_time_left(capsys, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(report.time, "time", lambda: clock[0])
    show = report.Progress(every=0)
    for k, loss in ((5, 1.0), (6, 2.0), (10, 2.0)):  # resumed at 4: the first call's own time isn't known
        show("training", k, 20, loss=loss, lr=1e-4, peak_gib=12.34)
        clock[0] += 10
    lines = capsys.readouterr().out.splitlines()
    assert "left" not in lines[0] and "5/20" in lines[0] and "12.3 GiB" in lines[0]
    assert "loss 1.1000" in lines[1] and "2 min 20 s left" in lines[1]  # 10 s a step, 14 to go
    assert "loss 1.1900" in lines[2] and "40 s left" in lines[2]  # 20 s for 5 steps, 10 to go


def test_a_phase_that_comes_again_counts_its_time_afresh_and_one_that_was_interrupted_does_not(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(report.time, "time", lambda: clock[0])
    show = report.Progress(every=0)
    for phase, done in (("training", 1), ("hold-out", 1), ("hold-out", 4), ("training", 2), ("hold-out", 1),
                        ("hold-out", 2)):
        show(phase, done, 4)
        clock[0] += 10
    lines = capsys.readouterr().out.splitlines()
    assert "1 min 00 s left" in lines[3]  # 30 s for the second step, 2 to go
    assert "left" not in lines[4] and "2/4  20 s left" in lines[5]  # 10 s for one picture, 2 to go


FIGURES = dict(loss=1.0, lr=1e-4, grad_norm=1.0, images_per_second=1.234, peak_gib=12.34)


def test_progress_says_what_a_step_gives_and_takes_the_runs_own_estimate(capsys):
    show = report.Progress(every=0)
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
    """The lines that stand in a terminal after `text`."""
    lines = [""]
    for part in re.split("(\n|\r\x1b\\[K)", text):
        lines = [*lines, ""] if part == "\n" else [*lines[:-1], ""] if part.startswith("\r") else [
            *lines[:-1], lines[-1] + part]
    return lines


@pytest.mark.parametrize("columns", [5, 40, 80, 200])
def test_in_a_terminal_one_line_is_rewritten_and_never_wider(monkeypatch, columns):
    terminal, show = in_a_terminal(monkeypatch, columns), report.Progress(every=0)
    for k in (1, 2, 3):
        show("training", k, 3, **FIGURES, left=10)
    assert terminal.getvalue().count("\n") == 1
    rewritten = re.split("\r\x1b\\[K", terminal.getvalue())[1:]
    assert all(len(line.strip()) < columns for line in rewritten)
    assert ("peak 12.3 GiB" in rewritten[-1]) == (columns == 200)
    if columns == 80:
        assert re.search(r"(loss 1.0000|learning rate 0.0001|images/s)$", rewritten[-1].strip())  # no half figure


def test_a_note_in_a_terminal_stands_above_the_line_at_once(monkeypatch):
    terminal, show = in_a_terminal(monkeypatch, 80), report.Progress(every=1000)
    show.note("goes on from checkpoint-120")
    show("drawing", 1, 2)
    show.note("a warning")
    lines = screen(terminal.getvalue())
    assert lines[:2] == ["goes on from checkpoint-120", "a warning"] and "1/2" in lines[2] and len(lines) == 3
    show("drawing", 2, 2)
    show.note("the end")
    lines = screen(terminal.getvalue())
    assert "2/2" in lines[2] and lines[3:] == ["the end", ""]


def test_a_note_where_nobody_watches_is_a_line_at_once(capsys):
    show = report.Progress()
    show("training", 1, 9, **FIGURES)
    show("training", 2, 9, **FIGURES)
    show.note("stopped at step 2")
    assert [line[:7] for line in capsys.readouterr().out.splitlines()] == ["trainin", "stopped"]


@pytest.mark.parametrize(
    "seconds, text", [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")]
)
def test_durations(seconds, text):
    assert report.duration(seconds) == text


def record(means, pictures=12, noise=0.0, best=None, steps=60):
    """A run's record with hold-out means {step: mean}, on pictures and timesteps that differ far more than steps."""
    rng = np.random.default_rng(0)
    levels = rng.lognormal(0, 0.5, (pictures, 1)) * [1.6, 1.2, 0.8, 0.4]
    levels /= levels.mean()
    holdout = {str(k): (m * levels * (1 + noise * rng.normal(size=levels.shape))).tolist() for k, m in means.items()}
    legs = [{"until": 20, "lr": 1e-4, "schedule": "constant"}, {"until": steps, "lr": 1e-5, "schedule": "cosine"}]
    return {"losses": np.linspace(1, 0.2, steps).tolist(), "holdout": holdout, "best_step": best, "step": steps,
            "recipe": {"legs": legs}}


@pytest.fixture
def drawn(monkeypatch):
    """The figures of `report.curves`, kept for a look at what they hold."""
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *args, **kwargs: (figures.append(f), save(f, *args, **kwargs)))
    return figures


def labels(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_curves_show_the_best_step_the_legs_and_each_noise_level(drawn):
    picture = report.curves({"run": record({0: 1.0, 30: 0.5, 60: 0.75}, best=30)})
    assert picture.width > 800 and np.asarray(picture.convert("L")).std() > 5
    left, right = drawn[0].axes
    lines = {line.get_label(): line for line in left.lines}
    assert labels(left) == ["training", "hold-out", "best: step 30"]
    assert lines["best: step 30"].get_xydata().ravel() == pytest.approx([30, 0.5])
    assert lines["hold-out"].get_ydata() == pytest.approx([1, 0.5, 0.75])
    assert len(lines["training"].get_xdata()) == 60 - 19 and lines["training"].get_xdata()[-1] == 60
    assert [list(line.get_xdata()) for line in left.lines if line.get_linestyle() == ":"] == [[20, 20]]
    assert labels(right) == ["0-249", "250-499", "500-749", "750-999"]
    assert all(line.get_ydata() == pytest.approx([0, -50, -25]) for line in right.lines[:4])


def test_the_band_is_that_of_the_paired_change(drawn):
    run = record({0: 1.0, 60: 0.9}, noise=0.01)
    report.curves({"run": run})
    first, last = (np.mean(losses, axis=1) for losses in run["holdout"].values())
    change = metrics.paired(first, last)
    band = drawn[0].axes[0].collections[0].get_paths()[0].vertices
    heights = {x: sorted(set(band[band[:, 0] == x, 1])) for x in (0, 60)}
    assert heights[0] == pytest.approx([first.mean()] * len(heights[0]))
    assert heights[60][0] == pytest.approx(first.mean() + change.low)
    assert heights[60][-1] == pytest.approx(first.mean() + change.high)
    assert heights[60][-1] - heights[60][0] < 0.2 * (metrics.mean(last).high - metrics.mean(last).low)


def test_without_a_holdout_there_is_the_training_panel_alone(drawn):
    report.curves({"run": record({})})
    assert [labels(axes) for axes in drawn[0].axes] == [["training"]]


def test_curves_of_several_runs_are_told_apart(drawn):
    one_step = record({}, steps=1) | {"losses": [0.5]}
    report.curves({"a": record({0: 1.0, 60: 0.5}, best=60), "b": record({0: 1.0}, pictures=1), "c": one_step})
    left, right = (labels(axes) for axes in drawn[0].axes)
    assert left == ["a: training", "a: hold-out", "a: best: step 60", "b: training", "b: hold-out", "c: training"]
    assert sorted(right) == ["0-249", "250-499", "500-749", "750-999", "a", "b"]


def rows(table):
    return [line.split("  ")[0] for line in repr(table).splitlines()[1:]]


def test_the_gain_is_counted_in_pairs():
    shown = report.gain(record({0: 0.9, 30: 0.9, 60: 0.4}, best=60))
    assert rows(shown) == ["base", "LoRA", "gain"]
    base, lora, gain = (row["hold-out loss"] for row in shown.rows)
    assert base.startswith("0.9 [") and lora.startswith("0.4 [") and gain.startswith("-0.5 [") and "(n = 12)" in gain
    assert rows(report.gain(record({0: 0.9, 30: 0.3, 60: 0.4}, best=30))) == ["base", "best step (30)", "LoRA", "gain"]


def test_the_gain_by_timestep_is_that_of_its_column():
    run = record({0: 1.0, 60: 0.5})
    run["holdout"]["60"] = [[a, b, c, 0.5 * d] for a, b, c, d in run["holdout"]["0"]]
    shown = report.by_timestep(run).rows
    assert [row["timesteps"] for row in shown] == ["0-249", "250-499", "500-749", "750-999"]
    assert [row["gain"].split()[0] for row in shown] == ["0", "0", "0", "-0.2"]
    assert shown[3]["base"] == "0.4" and shown[3]["LoRA"] == "0.2"


@pytest.mark.parametrize("ask", [report.gain, report.by_timestep, report.overfitting])
def test_where_nothing_was_held_out_no_figure_is_made_up(ask):
    assert ask(record({})) == "No picture was held out of training (holdout is 0), so there is nothing to measure by."
    assert "needs at least 2" in ask(record({0: 1.0, 30: 0.9, 60: 0.8}, pictures=1))
    enough = "3 or more" if ask is report.overfitting else "only once, at step 0"
    assert enough in ask(record({0: 1.0}))


def test_overfitting_is_told_from_a_fall_and_from_a_rise_too_small_to_matter():
    def verdict(*means):
        return report.overfitting(record({20 * k: m for k, m in enumerate(means)}, noise=0.001))

    assert "3 or more" in verdict(1.0, 0.8) and "there are 2" in verdict(1.0, 0.8)
    risen = verdict(1.0, 0.8, 0.9)
    assert "lowest at step 20 and has risen since by 0.1 [" in risen and risen.endswith("is in checkpoint-20.")
    assert verdict(1.0, 0.9, 0.8).startswith("No sign of over-fitting")
    assert verdict(1.0, 0.8, 0.805).startswith("No sign of over-fitting")  # sure, but half a percent


@pytest.mark.parametrize("pictures, noise", [(4, 0.1), (8, 0.05), (36, 0.2)])
def test_overfitting_seldom_cries_wolf_on_flat_noisy_curves(pictures, noise, monkeypatch):
    monkeypatch.setattr(metrics, "mean", lambda v: metrics.Figure(float(np.mean(v)), 0, 0, len(v)))  # no bootstrap
    rng, alarms = np.random.default_rng(1), 0
    levels = rng.lognormal(0, 0.4, (pictures, 1))
    for _ in range(400):
        losses = levels * (1 + noise * rng.normal(size=(10, pictures, 4)))
        run = {"holdout": {str(k): list(values) for k, values in enumerate(losses)}}
        alarms += "has risen" in report.overfitting(run)
    assert alarms < 0.05 * 400


def test_previews_are_read_by_step_and_prompt(tmp_path):
    (tmp_path / "previews").mkdir()
    for step, number, colour in ((90, 10, "blue"), (90, 2, "red"), (0, 0, "white")):
        Image.new("RGB", (16, 16), colour).save(tmp_path / "previews" / f"step-{step:06d}-{number}.jpg")
    found = report.previews(tmp_path)
    assert list(found) == [0, 90] and [len(pictures) for pictures in found.values()] == [1, 2]
    assert found[90][0].getpixel((8, 8))[0] > 200 and found[90][1].getpixel((8, 8))[2] > 200
    assert report.previews(tmp_path / "none") == {}


def test_a_table_escapes_html_and_aligns_its_text():
    shown = report.table([{"model": "<b>", "loss": metrics.Figure(1, 0.5, 2, 3)}, {"model": "LoRA & co", "loss": ""}])
    html = shown._repr_html_()
    assert "<b>" not in html and "&lt;b&gt;" in html and "LoRA &amp; co" in html and "1 [0.5, 2] (n = 3)" in html
    assert html.count("<tr>") == 3 and html.count("<td") == 4 and html.count("<th ") == 2
    assert repr(shown).splitlines() == ["model      loss", "<b>        1 [0.5, 2] (n = 3)", "LoRA & co"]


def test_json_holds_figures_and_arrays_and_reads_back(tmp_path):
    content = {"f": metrics.Figure(1.5, 1, 2, 9), "a": np.arange(3), "n": np.float32(0.5), "p": tmp_path, "é": "é"}
    file = report.write_json(tmp_path / "deep" / "a.json", content)
    read = report.read_json(file)
    assert read["f"] == {"value": 1.5, "low": 1, "high": 2, "n": 9}
    assert read["a"] == [0, 1, 2] and read["n"] == 0.5 and read["p"] == str(tmp_path) and read["é"] == "é"


def test_a_saved_notebook_keeps_each_phases_last_state_and_the_notes():
    """In a real kernel: one display a cell, also if one Progress serves several."""
    import nbformat
    from nbclient import NotebookClient

    first = (
        "from naruto_lora.report import Progress\nshow = Progress(every=0)\nshow.note('goes on <b>')\n"
        "for phase in ('captions', 'training', 'hold-out'):\n    for k in range(1, 6):\n        show(phase, k, 9)\n"
        "show('training', 6, 9)"
    )
    second = "show.every = 1000\nshow('hold-out', 1, 9)\nshow('hold-out', 2, 9)\nshow.note('ended')"
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in (first, second)])
    NotebookClient(book, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    kept = [cell.outputs for cell in book.cells]
    assert [[output.output_type for output in outputs] for outputs in kept] == [["display_data"]] * 2
    plain = [outputs[0].data["text/plain"].splitlines() for outputs in kept]
    assert [line.split("  ")[0] for line in plain[0]] == ["goes on <b>", "captions", "training", "hold-out"]
    assert "6/9" in plain[0][2] and "5/9" in plain[0][3]
    assert "1/9" in plain[1][0] and plain[1][1] == "ended"
    shown = kept[0][0].data["text/html"]
    assert "goes on &lt;b&gt;" in shown and shown.count("<progress") == 3
    assert "color" not in shown and "background" not in shown  # the theme's own
    assert "widget" not in json.dumps(book)


def test_importing_report_needs_no_matplotlib():
    code = "import sys; import naruto_lora.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
