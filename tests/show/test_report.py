"""A run as curves, tables, sentences and JSON."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from naruto_lora import files
from naruto_lora.measure import metrics
from naruto_lora.show import compare, report

ROOT = Path(__file__).parents[2]


def record(means, pictures=12, noise=0.0, best=None, steps=60):
    """A run's record with hold-out means {step: mean}; pictures and timesteps differ far more than steps."""
    rng = np.random.default_rng(0)
    levels = rng.lognormal(0, 0.5, (pictures, 1)) * [1.6, 1.2, 0.8, 0.4]
    levels /= levels.mean()
    holdout = {str(k): (m * levels * (1 + noise * rng.normal(size=levels.shape))).tolist() for k, m in means.items()}
    legs = [{"until": 20, "lr": 1e-4, "schedule": "constant"}, {"until": steps, "lr": 1e-5, "schedule": "cosine"}]
    return {"losses": np.linspace(1, 0.2, steps).tolist(), "holdout": holdout, "best_step": best, "step": steps,
            "recipe": {"legs": legs}}


@pytest.fixture
def drawn(monkeypatch):
    """The matplotlib figures that `report.curves` drew."""
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


def test_the_band_is_the_interval_of_the_paired_change(drawn):
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


def test_without_a_holdout_there_is_only_the_training_panel(drawn):
    report.curves({"run": record({})})
    assert [labels(axes) for axes in drawn[0].axes] == [["training"]]


def test_curves_of_several_runs_have_different_labels(drawn):
    one_step = record({}, steps=1) | {"losses": [0.5]}
    report.curves({"a": record({0: 1.0, 60: 0.5}, best=60), "b": record({0: 1.0}, pictures=1), "c": one_step})
    left, right = (labels(axes) for axes in drawn[0].axes)
    assert left == ["a: training", "a: hold-out", "a: best: step 60", "b: training", "b: hold-out", "c: training"]
    assert sorted(right) == ["0-249", "250-499", "500-749", "750-999", "a", "b"]


def rows(table):
    return [line.split("  ")[0] for line in repr(table).splitlines()[1:]]


def test_the_gain_is_paired():
    shown = report.gain(record({0: 0.9, 30: 0.9, 60: 0.4}, best=60))
    assert rows(shown) == ["base", "LoRA", "gain"]
    base, lora, gain = (row["hold-out loss"] for row in shown.rows)
    assert base.startswith("0.9 [") and lora.startswith("0.4 [") and gain.startswith("-0.5 [") and "(n = 12)" in gain
    assert rows(report.gain(record({0: 0.9, 30: 0.3, 60: 0.4}, best=30))) == ["base", "best step (30)", "LoRA", "gain"]


def test_the_gain_by_timestep_is_calculated_from_its_column():
    run = record({0: 1.0, 60: 0.5})
    run["holdout"]["60"] = [[a, b, c, 0.5 * d] for a, b, c, d in run["holdout"]["0"]]
    shown = report.by_timestep(run).rows
    assert [row["timesteps"] for row in shown] == ["0-249", "250-499", "500-749", "750-999"]
    assert [row["gain"].split()[0] for row in shown] == ["0", "0", "0", "-0.2"]
    assert shown[3]["base"] == "0.4" and shown[3]["LoRA"] == "0.2"


@pytest.mark.parametrize("ask", [report.gain, report.by_timestep, report.overfitting])
def test_too_few_measurements_give_a_sentence_instead_of_a_figure(ask):
    assert ask(record({})) == "No picture was held out of training (holdout is 0), so nothing can be measured."
    assert "needs at least 2" in ask(record({0: 1.0, 30: 0.9, 60: 0.8}, pictures=1))
    enough = "3 or more" if ask is report.overfitting else "only once, at step 0"
    assert enough in ask(record({0: 1.0}))


def test_overfitting_is_not_a_fall_or_a_very_small_rise():
    def verdict(*means):
        return report.overfitting(record({20 * k: m for k, m in enumerate(means)}, noise=0.001))

    assert "3 or more" in verdict(1.0, 0.8) and "there are 2" in verdict(1.0, 0.8)
    risen = verdict(1.0, 0.8, 0.9)
    assert "lowest at step 20 and has risen since by 0.1 [" in risen and risen.endswith("is in checkpoint-20.")
    assert verdict(1.0, 0.9, 0.8).startswith("No sign of over-fitting")
    assert verdict(1.0, 0.8, 0.805).startswith("No sign of over-fitting")  # significant, but only half a percent


def test_overfitting_names_a_step_with_a_checkpoint_even_if_the_base_was_best():
    verdict = report.overfitting(record({0: 1.0, 20: 1.1, 40: 1.3}))
    assert "lowest at step 20" in verdict and verdict.endswith("is in checkpoint-20.")


def test_measurements_are_sorted_by_step():
    run = record({0: 1.0, 5: 0.8, 10: 0.9, 100: 0.7}, best=100)
    shuffled = run | {"holdout": dict(sorted(run["holdout"].items(), reverse=True))}
    assert repr(report.gain(shuffled)) == repr(report.gain(run)) and report.overfitting(shuffled).endswith("step 100.")


@pytest.mark.parametrize("pictures, noise", [(4, 0.1), (8, 0.05), (36, 0.2)])
def test_overfitting_gives_few_false_alarms_on_flat_noisy_curves(pictures, noise, monkeypatch):
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


def test_previews_that_are_shown_are_read_and_closed(tmp_path, monkeypatch):
    """Of a hundred steps the four that `over_time` shows."""
    (tmp_path / "previews").mkdir()
    for step in range(0, 1000, 10):
        Image.new("RGB", (16, 16), (step // 4, 0, 0)).save(tmp_path / "previews" / f"step-{step:06d}-0.jpg")
    read, loaded = [], report.loaded
    monkeypatch.setattr(report, "loaded", lambda file: (read.append(file.stem), loaded(file))[1])
    files_open = len(os.listdir("/proc/self/fd"))
    found = report.previews(tmp_path)
    assert list(found) == [0, 330, 660, 990] and len(read) == 4 and len(os.listdir("/proc/self/fd")) == files_open
    assert found[990][0].getpixel((8, 8))[0] > 230
    whole = report.previews(tmp_path, 1000)
    assert list(whole) == list(range(0, 1000, 10))
    one, all_ = compare.over_time(found, ["x"], 64), compare.over_time(whole, ["x"], 64)
    assert one.size == all_.size and one.tobytes() == all_.tobytes()


def test_previews_that_can_not_be_read_are_passed_over(tmp_path):
    (tmp_path / "previews").mkdir()
    for step in (0, 10, 20):
        for number in (0, 1):
            Image.new("RGB", (16, 16), "red").save(tmp_path / "previews" / f"step-{step:06d}-{number}.jpg")
    (tmp_path / "previews" / "step-000010-0.jpg").write_bytes(b"no picture")
    for name in ("step-000020-0.jpg", "step-000020-1.jpg", "step-x-y.jpg"):
        (tmp_path / "previews" / name).write_bytes(b"")
    found = report.previews(tmp_path)
    assert list(found) == [0, 10] and found[10][0] is None and found[10][1].getpixel((8, 8))[0] > 200
    assert compare.over_time(found, ["a", "b"], 32).height == compare.over_time({0: found[0]}, ["a", "b"], 32).height


def test_a_table_escapes_html_and_aligns_its_text():
    shown = report.table([{"model": "<b>", "loss": metrics.Figure(1, 0.5, 2, 3)}, {"model": "LoRA & co", "loss": ""}])
    html = shown._repr_html_()
    assert "<b>" not in html and "&lt;b&gt;" in html and "LoRA &amp; co" in html and "1 [0.5, 2] (n = 3)" in html
    assert html.count("<tr>") == 3 and html.count("<td") == 4 and html.count("<th ") == 2
    assert repr(shown).splitlines() == ["model      loss", "<b>        1 [0.5, 2] (n = 3)", "LoRA & co"]


def test_json_holds_figures_and_arrays_and_reads_back(tmp_path):
    content = {"f": metrics.Figure(1.5, 1, 2, 9), "a": np.arange(3), "n": np.float32(0.5), "p": tmp_path, "é": "é"}
    file = files.write_json(tmp_path / "deep" / "a.json", content)
    read = files.read_json(file)
    assert read["f"] == {"value": 1.5, "low": 1, "high": 2, "n": 9}
    assert read["a"] == [0, 1, 2] and read["n"] == 0.5 and read["p"] == str(tmp_path) and read["é"] == "é"


@pytest.mark.parametrize("content", [
    b"", b'{"losses": [1.0, 2', b"\0" * 400, b"\xff\xfe", b"null", b"[1]", b"5", b"[" * 100_000, b'{"losses": [1.0]}',
], ids=range(9))  # fmt: skip
def test_a_damaged_record_is_named_with_its_fix(tmp_path, content):
    assert report.record_of(tmp_path) is None
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"'{tmp_path}/run.json' is damaged: train with the same settings again, whi"):
        report.record_of(tmp_path)


def test_a_whole_record_is_read(tmp_path):
    whole = record({0: 1.0}) | {"seconds": 5.0, "pictures": {}, "device": "CPU", "more": "of a newer version"}
    files.write_json(tmp_path / "run.json", whole)
    assert report.record_of(tmp_path) == whole


def test_a_table_has_no_letter_that_steers_a_terminal():
    shown = report.table([{"caption": "a\x1b[2J\x07 \u202eman\nb", "n": 1}, {"caption": "é 少女 😀", "n": 2}])
    assert repr(shown).splitlines() == ["caption     n", "a[2J man b  1", "é 少女 😀      2"]
    assert "a[2J man b<" in shown._repr_html_()


def test_importing_report_needs_no_matplotlib():
    code = "import sys; import naruto_lora.show.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
