"""A run as curves, tables and sentences."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import TYPE_CHECKING

from .. import files
from ..reading.picture import UNREADABLE, loaded

if TYPE_CHECKING:
    import numpy as np


HIDDEN = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufeff\ufffe\uffff]")
RECORD = ("losses", "holdout", "best_step", "seconds", "recipe", "step", "pictures", "device")  # keys of run.json
BINS = ("0-249", "250-499", "500-749", "750-999")  # noise levels: the timesteps of each hold-out column


def _measured(record: dict) -> dict[int, np.ndarray]:
    """{step: hold-out losses (N, 4) by picture and timestep bin}, sorted by step; empty without a hold-out."""
    import numpy as np

    return {step: np.asarray(losses) for step, losses in sorted((int(k), v) for k, v in record["holdout"].items())}


def curves(records: dict[str, dict], smoothing: int = 20):
    """The loss of each named run's record by step, as one PIL picture; beside it the hold-out loss by noise level.

    The line is the smoothed training loss, the faint dots its single steps. The band around the mean hold-out loss is
    the 95% interval of its *change* since the first measurement, paired by picture. (Pictures differ in loss far more
    than training changes any of them, so an interval of the mean itself would hide the change.) At the first step
    the band has no width. Dotted lines are the ends of legs, the star is the best step.
    """
    import io

    from matplotlib import rc_context
    from matplotlib.figure import Figure

    measured = any(len(record["holdout"]) for record in records.values())
    with rc_context({"font.size": 12, "axes.grid": True, "grid.alpha": 0.3, "legend.frameon": False}):
        figure = Figure(figsize=(8, 5) if measured else (5.5, 4.2), dpi=120, layout="constrained")
        panels = figure.subplots(1, 2 if measured else 1, width_ratios=[3, 2][: 1 + measured], squeeze=False)[0]
        extent = [bound for n, (name, record) in enumerate(records.items())
                  for bound in _draw_losses(panels[0], record, f"{name}: " if len(records) > 1 else "", f"C{n}",
                                            smoothing)]
        low, high = min(extent), max(extent)
        margin = 0.15 * (high - low) or 0.1 * abs(high) or 1.0
        panels[0].set(xlabel="step", ylabel="denoising loss", ylim=(low - margin, high + margin))
        if measured:
            _draw_bins(panels[1], records)
        for axes in panels:  # below the axes, away from the curves
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), fontsize=10, columnspacing=1,
                        handlelength=1.5, handletextpad=0.5, ncols=1 if axes is panels[0] and len(records) == 1 else 2)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    return loaded(buffer)


def _draw_losses(axes, record: dict, prefix: str, colour: str, smoothing: int) -> list[float]:
    """Draws one run; returns the values that set the panel's limits, without the single steps, which scatter widely."""
    import numpy as np

    from ..measure import metrics

    losses, extent = np.asarray(record["losses"]), []
    if len(losses):
        width = max(1, min(smoothing, len(losses)))
        smooth = np.convolve(losses, np.ones(width) / width, "valid")
        axes.plot(np.arange(1, len(losses) + 1), losses, ".", color=colour, alpha=0.15, markersize=3)
        axes.plot(np.arange(width, len(losses) + 1), smooth, color=colour, alpha=0.5, linewidth=1.2,
                  label=f"{prefix}training")
        extent += [smooth.min(), smooth.max()]
    held = {step: values.mean(axis=1) for step, values in _measured(record).items()}
    if held:
        steps, first = list(held), next(iter(held.values()))
        means = np.array([values.mean() for values in held.values()])
        axes.plot(steps, means, "o--", color=colour, markersize=4, linewidth=2, label=f"{prefix}hold-out")
        extent += [means.min(), means.max()]
    if len(held) > 1 and len(first) > 1:
        changes = [metrics.paired(first, values) for values in held.values()]
        low, high = (first.mean() + np.array([getattr(c, end) for c in changes]) for end in ("low", "high"))
        axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
        extent += [low.min(), high.max()]
    best = record["best_step"]
    if best in held:
        axes.plot(best, held[best].mean(), "*", color=colour, markersize=15, markeredgecolor="black",
                  label=f"{prefix}best: step {best}")
    for leg in record["recipe"]["legs"][:-1]:
        axes.axvline(leg["until"], color="grey", linestyle=":", linewidth=1)
    return extent


def _draw_bins(axes, records: dict[str, dict]) -> None:
    """Draws the hold-out loss's change since the first measurement, in percent, a line for each noise level."""
    styles = ("-", "--", ":", "-.")
    for n, (name, record) in enumerate(records.items()):
        means = {step: values.mean(axis=0) for step, values in _measured(record).items()}
        for k, label in enumerate(BINS if means else ()):
            first = next(iter(means.values()))[k]
            change = [100 * (value[k] / first - 1) for value in means.values()]
            axes.plot(list(means), change, styles[n % 4], marker="o", markersize=3, color=f"C{k + 4}",
                      label=label if n == 0 or label not in axes.get_legend_handles_labels()[1] else None)
        if means and len(records) > 1:
            axes.plot([], [], styles[n % 4], color="black", label=name)
    axes.axhline(0, color="grey", linewidth=1)
    axes.set(xlabel="step", ylabel="change in %", title="hold-out by timestep")
    axes.title.set_fontsize(12)


NO_HOLDOUT = "No picture was held out of training (holdout is 0), so nothing can be measured."


def _too_little(record: dict) -> str | None:
    """The reason why a run's hold-out losses can't be compared, or None."""
    if not record["holdout"]:
        return NO_HOLDOUT
    if len(next(iter(record["holdout"].values()))) < 2:
        return "Only one picture was held out of training; an interval needs at least 2: raise `holdout`."
    if len(record["holdout"]) < 2:
        return f"The hold-out loss was measured only once, at step {next(iter(record['holdout']))}: train longer."
    return None


def gain(record: dict):
    """A table of the hold-out loss before and after, and the paired gain; a sentence if it can't be measured."""
    from ..measure import metrics

    if reason := _too_little(record):
        return reason
    losses = {step: values.mean(axis=1) for step, values in _measured(record).items()}
    first, *_, last = losses
    rows = [{"": "base", "hold-out loss": metrics.mean(losses[first])}]
    best = record["best_step"]
    if best not in (None, last):
        rows.append({"": f"best step ({best})", "hold-out loss": metrics.mean(losses[best])})
    return table(rows + [
        {"": "LoRA", "hold-out loss": metrics.mean(losses[last])},
        {"": "gain", "hold-out loss": metrics.paired(losses[first], losses[last])},
    ])


def by_timestep(record: dict):
    """`gain` for each noise level, a row for each bin of timesteps; a sentence if it can't be measured."""
    from ..measure import metrics

    if reason := _too_little(record):
        return reason
    first, *_, last = _measured(record).values()
    return table([
        {
            "timesteps": label,
            "base": f"{first[:, k].mean():.3g}",
            "LoRA": f"{last[:, k].mean():.3g}",
            "gain": metrics.paired(first[:, k], last[:, k]),
        }
        for k, label in enumerate(BINS)
    ])


def overfitting(record: dict) -> str:
    """One sentence on whether the hold-out loss has risen since its best step, compared picture by picture.

    A rise counts if it is above 1% of the first measurement's loss and above 3 (1 + 2/N) standard errors of the
    paired difference, N pictures. The best of many measurements is partly best by chance: on flat noisy curves of 10
    measurements (simulated, noise 2% to 20%) the 95% interval gives a false alarm in 14% to 17% of runs at N = 8 to
    36. This bound does so in 1% to 2% there, in 3% at N = 4, 4% at N = 3 and still 11% at N = 2.
    """
    import numpy as np

    from ..measure import metrics

    reason = _too_little(record)
    if reason and len(record["holdout"]) != 1:
        return reason
    if len(record["holdout"]) < 3:
        return f"Over-fitting shows only with 3 or more hold-out measurements; there are {len(record['holdout'])}."
    losses = {step: values.mean(axis=1) for step, values in _measured(record).items()}
    first, *later = losses
    best, last = min(later, key=lambda step: losses[step].mean()), later[-1]
    if best == last:
        return f"No sign of over-fitting: the hold-out loss is lowest at the last measurement, step {last}."
    change = losses[last] - losses[best]
    error = change.std(ddof=1) / np.sqrt(len(change))
    rise = metrics.mean(change)
    if rise.value > max(3 * (1 + 2 / len(change)) * error, 0.01 * losses[first].mean()):
        return (
            f"The hold-out loss was lowest at step {best} and has risen since by {rise}: the LoRA has begun to "
            f"memorise its training pictures; the adapter of that step is in checkpoint-{best}."
        )
    return (
        f"No sign of over-fitting: since the lowest hold-out loss, at step {best}, the change by step {last} "
        f"is {rise}, within measurement noise."
    )


def previews(folder: str | Path, columns: int = 4) -> dict[int, list]:
    """The previews {step: PIL pictures, in the order of prompts} of the run in `folder`, for `over_time`.

    Of more than `columns` steps only those that `over_time` shows are read. A picture that can't be read is None.
    """
    found: dict[int, dict[int, Path]] = {}
    for file in (Path(folder) / "previews").glob("step-*-*.jpg"):
        named = re.fullmatch(r"step-(\d+)-(\d+)", file.stem)
        if named and file.stat().st_size:  # a full disk leaves files of length 0
            found.setdefault(int(named[1]), {})[int(named[2])] = file
    steps, count = sorted(found), min(columns, len(found))
    steps = [steps[round(k * (len(steps) - 1) / max(1, count - 1))] for k in range(count)]
    return {step: [_readable(file) for _, file in sorted(found[step].items())] for step in steps}


def _readable(file: Path):
    try:
        return loaded(file)
    except UNREADABLE:
        return None


def plan(made):
    """A memory plan (`plan.Plan`) as a table: a row for each rung, the chosen one marked; time relative to rung 1."""
    first = made.rows[0].seconds
    return table([
        {
            "": "chosen" if row is made.chosen else "",
            "rung": row.what,
            "costs": row.costs,
            "GiB, predicted": f"{row.parts.reserved / 2**30:.2g}" if row.parts.reserved < 2**30 else
            f"{row.parts.reserved / 2**30:.1f}",
            "time, modelled": f"{row.seconds / first:.2f}",
        }
        for row in made.rows
    ])


def record_of(folder: str | Path) -> dict | None:
    """The record (run.json) of the run in `folder`; None if there is none. Raises ValueError for a damaged one."""
    file = Path(folder) / "run.json"
    if not file.is_file():
        return None
    try:
        record = files.read_json(file)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("recipe"), dict) or not set(RECORD) <= set(record):
        raise ValueError(f"'{file}' is damaged: train with the same settings again, which only writes this file anew")
    return record


def lora_name(record: dict) -> str:
    """The name of the run's LoRA file for other programs than diffusers; earlier runs named it after their recipe."""
    return Path(record.get("file") or f"{record['recipe']['name']}.safetensors").name


def readable(text: str) -> str:
    """`text` on one line, without the control letters that steer a terminal or change the direction of writing."""
    return HIDDEN.sub("", " ".join(text.split()))


def table(rows: list[dict]):
    """Rows with the same keys as a small HTML table for a notebook, or plain text elsewhere."""
    return _Table(rows)


class _Table:
    def __init__(self, rows: list[dict]):
        self.rows = [{key: readable(str(value)) for key, value in row.items()} for row in rows]

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
