"""A comparison as one self-contained HTML file: verdict, figures, pictures, curves, how it was made."""

from __future__ import annotations

import html
from pathlib import Path

from PIL import Image

from .. import files
from ..measure import verdict
from . import compare, report

STYLE = """
:root { color-scheme: light dark; --line: #8884; --quiet: #6b6b76; --soft: #8881 }
@media (prefers-color-scheme: dark) { :root { --quiet: #a9a9b4 } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 1rem }
h1 { line-height: 1.2 } h2 { margin-top: 2.2rem }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { text-align: left; vertical-align: top; padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--line) }
td { min-width: 4.5rem } td + td + td { min-width: 8rem }
.wide { overflow-x: auto } .quiet { color: var(--quiet) }
.verdict { border-left: 4px solid #2b7de9; background: var(--soft); padding: .4rem 1rem; margin: 1rem 0 }
.sheet { max-width: 100%; height: auto; background: #fff; border-radius: 6px }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def write(path: str | Path, record: dict, drawn: dict[str, list], prompts: list[str],
          sheets: dict[str, Image.Image] | None = None) -> Path:
    """Writes the page; returns its path. `record` is from `summary`, `drawn` {label: pictures} from `study.draw`.

    `sheets` are further pictures, {title: picture}: curves, strips, nearest pairs. All text is escaped, and the page
    loads nothing from other places. Raises OSError.
    """
    parts = [f"<h1>{' · '.join(map(html.escape, drawn))}</h1>", *_verdict(record), *_grid(drawn, prompts)]
    parts += ["<h2>Figures</h2>", _table(verdict.rows(record["figures"])), _note(record)]
    for pair, changes in record["changes"].items():
        parts += [f"<h3>{html.escape(pair)}</h3>", _table(_change_rows(changes))]
    parts += ["<h2>What the figures say, and can't say</h2>", _table(verdict.limits(record["figures"]))]
    for title, picture in (sheets or {}).items():
        parts += [f"<h2>{html.escape(title)}</h2>", _sheet(picture, title)]
    parts += _making(record)
    head = (f'<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">')
    title = html.escape(" and ".join(drawn))
    text = f"<!doctype html><html lang=en><head>{head}<title>{title}</title><style>{STYLE}</style></head>" \
           f"<body>{''.join(parts)}</body></html>"
    text = report.HIDDEN.sub("", text)
    files.replace(Path(path), lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return Path(path)


def _verdict(record: dict) -> list[str]:
    return [f'<p class="verdict">{html.escape(sentence)}</p>' for sentence in record["verdict"]]


def _grid(drawn: dict, prompts: list[str]) -> list[str]:
    """A slider of the first and the last model, then a row of pictures for each prompt and seed."""
    first, last = list(drawn)[0], list(drawn)[-1]
    per_prompt = len(drawn[first]) // len(prompts)
    size = 512 if drawn[first][0].width >= 256 else 384
    parts = ["<h2>Pictures</h2><p>In each row the noise is the same; only the LoRA differs. Drag the handle; click a "
             "picture to enlarge it.</p>", compare.slider(drawn[first][0], drawn[last][0], (first, last), size)]
    for k, pictures in enumerate(zip(*drawn.values(), strict=True)):
        if k % per_prompt == 0:
            parts.append(f"<p>{html.escape(prompts[k // per_prompt])}</p>")
        small = [p if p.width <= 512 else p.resize((512, 512), Image.Resampling.LANCZOS) for p in pictures]
        parts.append(compare.cards(dict(zip(drawn, small, strict=True)), 256))
    return parts


def _change_rows(changes: dict) -> list[dict]:
    return [{"figure": verdict.METRICS[name].title, "change": str(change), "": verdict.judge(name, change)}
            for name, change in changes.items() if name in verdict.METRICS]


def _note(record: dict) -> str:
    note = (f"95% intervals over n prompts or pictures. Encoder: {record['encoder']}; prompt fit is "
            f"{record['fit_means']}. A change counts if its 99.2% interval excludes 0: several figures are tested.")
    return f'<p class="quiet">{html.escape(note)}</p>'


def _making(record: dict) -> list[str]:
    """Tables: the runs, the settings of the pictures, the machine."""
    settings = {key: value for key, value in record["settings"].items() if isinstance(value, (str, int, float))}
    drawn = [{"what": key.replace("_", " "), "here": str(value)} for key, value in settings.items()]
    drawn += [{"what": "seeds", "here": f"{record['seeds'][0]} to {record['seeds'][-1]}, one for each picture"}]
    parts = ["<h2>How it was made</h2>"]
    parts += [_table(record["runs"])] if record["runs"] else []
    return parts + ["<h3>Drawing</h3>", _table(drawn), "<h3>Machine</h3>", _table(record["machine"])]


def _table(rows: list[dict]) -> str:
    return f'<div class="wide">{report.table(rows)._repr_html_()}</div>' if rows else "<p>Nothing was measured.</p>"


def _sheet(picture: Image.Image, title: str) -> str:
    return f'<img class="sheet" src="{compare.data_url(picture)}" alt="{html.escape(title)}">'


def summary(comparison, runs: dict[str, dict], encoder, settings: dict, seeds: list[int], prompts: list[str],
            machine: list[dict]) -> dict:
    """The record for `write`, `model_card.write` and `files.write_json`. `runs` are {label: the run's record}."""
    minutes = {label: run["seconds"] / 60 for label, run in runs.items()}
    sentences = [
        verdict.words(changes, a, b, minutes[b] - minutes.get(a, 0) if b in minutes else None)
        for (a, b), changes in comparison.changes.items()
    ]
    rows = [{"model": label} | _run_row(run) for label, run in runs.items()]
    return {
        "verdict": sentences + verdict.copied(comparison.figures),
        "figures": comparison.figures,
        "changes": {f"{b} against {a}": changes for (a, b), changes in comparison.changes.items()},
        "encoder": encoder.name, "fit_means": encoder.fit_means, "settings": settings, "seeds": seeds,
        "prompts": prompts, "runs": rows,
        "recipes": {label: run["recipe"] for label, run in runs.items()}, "machine": machine,
        "curves": {label: {key: run[key] for key in ("losses", "holdout")} for label, run in runs.items()},
    }  # fmt: skip


def _run_row(run: dict) -> dict:
    recipe = run["recipe"]
    legs = ", then ".join(f"{leg['lr']:g} {leg['schedule']} to {leg['until']}" for leg in recipe["legs"])
    return {
        "trained at": f"{recipe['resolution']} px",
        "steps": f"{run['step']} x {recipe['batch'] * recipe['accumulation']}",
        "rank": recipe["rank"], "learning rate": legs, "minutes": f"{run['seconds'] / 60:.1f}",
        "peak GiB": f"{run['peak_gib']:.1f}" if run.get("peak_gib") else "-", "on": run["device"],
        "pictures": f"{run['pictures']['training']} + {run['pictures']['holdout']} held out",
    }  # fmt: skip
