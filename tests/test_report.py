"""What a person sees of a run, and what a program reads."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

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


def test_progress_in_a_terminal_rewrites_its_line(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    show = report.Progress(every=0)
    show("drawing", 1, 2)
    show("drawing", 2, 2)
    text = terminal.getvalue()
    assert text.count("\r") == 2 and text.count("\n") == 1 and text.endswith("\n")


@pytest.mark.parametrize(
    "seconds, text", [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")]
)
def test_durations(seconds, text):
    assert report.duration(seconds) == text


def record(holdout):
    return {"losses": np.linspace(1, 0.2, 60).tolist(), "holdout": holdout}


@pytest.mark.parametrize("holdout", [{}, {"0": [1.0, 0.8], "60": [0.4, 0.2]}])
def test_curves_with_and_without_a_holdout(holdout):
    picture = report.curves({"run": record(holdout), "one step": {"losses": [0.5], "holdout": {}}})
    pixels = np.asarray(picture.convert("RGB")).astype(int)
    assert picture.width > 600 and picture.height > 250
    blue = (np.abs(pixels - (31, 119, 180)).max(-1) < 40).sum()  # the first run's colour
    assert blue > (600 if holdout else 300)


def test_curves_show_the_holdout_where_it_is():
    without, with_it = (
        np.asarray(report.curves({"run": record(h)}).convert("L")) for h in ({}, {"0": [0.9], "60": [0.1]})
    )
    assert without.shape == with_it.shape and (without != with_it).mean() > 0.002


def test_without_a_holdout_the_curves_have_no_empty_entry(monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    monkeypatch.setattr(Axes, "legend", lambda axes, **_: drawn.append(axes.get_legend_handles_labels()[1]))
    report.curves({"run": record({})})
    report.curves({"run": record({"0": [1.0, 0.8]})})
    assert drawn == [["run: training"], ["run: training", "run: hold-out"]]


def test_the_gain_is_counted_in_pairs():
    text = repr(report.gain(record({"0": [1.0, 0.8], "30": [0.9, 0.9], "60": [0.5, 0.3]})))
    assert [line.split()[:2] for line in text.splitlines()[1:]] == [["base", "0.9"], ["LoRA", "0.4"], ["gain", "-0.5"]]
    assert "-0.5 [-0.5, -0.5] (n = 2)" in text


def test_where_nothing_was_held_out_no_figure_is_made_up():
    assert report.gain(record({})) == (
        "No picture was held out of training (holdout is 0), so there is nothing to measure by."
    )


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


def test_in_a_notebook_each_phase_leaves_one_line():
    """In a real kernel: what a saved notebook keeps."""
    import nbformat
    from nbclient import NotebookClient

    code = (
        "from naruto_lora.report import Progress\nshow = Progress(every=0)\n"
        "for phase in ('captions', 'pictures'):\n    for k in range(1, 6):\n        show(phase, k, 5)"
    )
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    NotebookClient(book, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    outputs = book.cells[0].outputs
    assert [output.output_type for output in outputs] == ["display_data"] * 2
    texts = [output.data["text/html"] for output in outputs]
    assert "captions" in texts[0] and "pictures" in texts[1] and all("5/5" in text for text in texts)
    assert "widget" not in json.dumps(book)


def test_importing_report_needs_no_matplotlib():
    code = "import sys; import naruto_lora.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_phase_that_comes_again_has_a_line_of_its_own(monkeypatch):
    made = []

    class Handle:
        def update(self, shown):
            made[-1].append(shown.data)

    def display(shown, display_id):
        made.append([shown.data])
        return Handle()

    monkeypatch.setattr(report, "_in_notebook", lambda: True)
    monkeypatch.setattr("IPython.display.display", display)
    show = report.Progress(every=0)
    for done in (1, 2, 1, 2):
        show("drawing", done, 2)
    assert [len(line) for line in made] == [2, 2] and "2/2" in made[0][1]
