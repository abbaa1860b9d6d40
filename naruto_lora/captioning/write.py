"""The captions of a data set: made once before training, where they are missing, and kept where the pictures are."""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from .. import data
from ..progress import note
from ..reading import captions, layout, words
from ..reading.report import Found
from ..reading.style import without_style
from . import captioners
from .places import Places

MODES = ("missing", "all", "none")


@dataclass
class Report:
    """What `caption` did; in words as text."""

    captioner: str
    mode: str
    pictures: int
    made: int = 0  # captions written now
    here: int = 0  # of them, those that only `file` can take
    replaced: int = 0  # of them, in place of a caption that was there before; it is kept as `before`
    yours: int = 0  # captions that were there and stay
    earlier: int = 0  # captions made by an earlier call
    lost: collections.Counter = field(default_factory=collections.Counter)  # {phrase of style: captions}
    cleaned: int = 0  # captions that lost such a phrase
    silent: list[str] = field(default_factory=list)  # pictures for which the captioner found no words
    file: Path | None = None  # which caption is whose
    examples: list | None = field(default=None, repr=False)  # the whole set, if nothing had to be written

    def __str__(self) -> str:
        if self.mode == "none":
            return f"all {self.pictures:,} pictures are used without captions; those in your files stay there, unread"
        texts = [f"{self.made:,} of {self.pictures:,} captions written by {self.captioner}"]
        if self.here:
            texts[0] += f" into '{self.file}'"
        if self.replaced and self.file:
            texts.append(f"{self.replaced:,} in place of yours (kept in {self.file.name} as `before`)")
        if self.earlier:
            texts.append(f"{self.earlier:,} written before")
        if self.yours:
            texts.append(f"{self.yours:,} of your own left as they are")
        if self.cleaned:
            common = ", ".join(f"'{words}' {count} times" for words, count in self.lost.most_common(3))
            texts.append(f"{self.cleaned:,} lost words that name a style ({common})")
        if self.silent:
            texts.append(f"no words found for {', '.join(self.silent[:3])}" + " ..." * (len(self.silent) > 3))
        return "; ".join(texts)


def caption(dataset: str | Path, captioner: str = "blip", mode: str = "missing", prefix: str = "", show=None,
            mirror: str | Path | None = None, drop: tuple[str, ...] = (),
            found: Found | None = None) -> Report:  # fmt: skip
    """Writes captions for the pictures of `dataset`, a folder, zip or hub id, so that `data.load` finds them.

    `mode`: 'missing' captions only pictures without one; 'all' replaces the captions that were there (they are kept),
    but not what you edited since; 'none' uses every picture without words (of `prefix` alone, if there is one).
    `prefix`, such as a trigger word, starts each caption that is written. Words that name a style are taken out, and
    those of `drop`. A folder gets a .txt beside each picture, or lines in its metadata.jsonl; for a zip or a hub id
    see `reading.captions`. What a killed call wrote stays, and the next goes on from there. `mirror` is a folder (on
    Google Drive) for a copy of what was made; `found` as in `data.load`. Raises ValueError for an unknown mode, what
    `data.load` and `captioners.load` raise, and OSError if nothing can be written.
    """
    if mode not in MODES:
        raise ValueError(f"the mode '{mode}' is unknown: choose {', '.join(MODES)}")
    dataset = layout.clean(dataset)
    _share(dataset, mirror, show)
    kept = captions.Captions(dataset)
    if mode != "none" and any(row["by"] == captions.NO_WORDS for row in kept.rows.values()):
        kept.rewrite([row for row in kept.rows.values() if row["by"] != captions.NO_WORDS])
    examples = data.load(dataset, captioned=False, show=None if found else show, found=found)
    places = Places(dataset, examples)
    report = Report(captioner, mode, len(examples), file=places.kept.file)
    if mode == "none":
        rows = [captions.row(e, prefix.strip(), captions.NO_WORDS, here=True) for e in examples]
        places.kept.put(row for row, example in zip(rows, examples, strict=True) if places.kept.get(example) != row)
    else:
        todo = [e for e in examples if _is_due(e, places, mode, report, prefix)]
        report.examples = None if todo or report.earlier else examples
        _write(todo, places, report, prefix, show, drop)
    _share(dataset, mirror, show)
    return report


def captioned(dataset: str | Path, captioner: str = "blip", mode: str = "missing", prefix: str = "", show=None,
              mirror: str | Path | None = None, found: Found | None = None) -> list[data.Example]:  # fmt: skip
    """The examples of `dataset`, captioned by `caption`, which says what it did; `found` as in `data.load`.

    Raises what `caption` raises, and ValueError for a picture that the captioner found no words for.
    """
    report = caption(dataset, captioner, mode, prefix, show, mirror, found=found)
    if report.examples is not None:
        return report.examples
    note(show, str(report))
    again = Found()
    examples = data.load(dataset, found=again)
    if found:
        found.captions = again.captions
    return examples


def _is_due(example: data.Example, places: Places, mode: str, report: Report, prefix: str) -> bool:
    """Whether a picture is to be captioned now; counts those that are not, and restores what is known already."""
    row, text = places.kept.get(example), example.caption
    ours = row if row and row["by"] not in (captions.YOU, captions.NO_WORDS) else None
    if row and row["by"] == captions.YOU and row["here"]:
        report.yours += 1  # also where it is empty
        return False
    if words.is_empty(text):
        if ours and ours["text"] and ours["by"] == report.captioner and ours.get("prefix", "") == prefix:
            places.write(example, ours["text"], ours["by"])  # its file is lost, or this is another machine
            report.earlier += 1
            return False
        return True
    if ours and ours["text"] == text:
        stale = ours["by"] != report.captioner or ours.get("prefix", "") != prefix
        report.earlier += not (mode == "all" and stale)
        return mode == "all" and stale
    edited = row is not None  # since it was made
    report.yours += mode == "missing" or edited
    return mode == "all" and not edited


def _write(todo: list[data.Example], places: Places, report: Report, prefix: str, show, drop: tuple[str, ...]) -> None:
    if not todo:
        return
    model = captioners.load(report.captioner, show)
    try:
        for batch, texts in _described(todo, model):
            rows = []
            for example, raw in zip(batch, texts, strict=True):
                text, lost = without_style(" ".join(raw.split()), drop)
                if not text:
                    report.silent.append(example.name)
                    continue
                known = places.kept.get(example)
                before = known.get("before", "") if known else example.caption
                rows.append(places.write(example, prefixed(prefix, text), report.captioner, before, prefix=prefix))
                report.made += 1
                report.here += rows[-1]["here"]
                report.replaced += bool(example.caption and before)
                report.cleaned += bool(lost)
                report.lost.update(set(lost))
            places.kept.put(rows)
            if show:
                show("captioning", report.made + len(report.silent), len(todo))
    finally:
        del model
        _free()


def prefixed(prefix: str, text: str) -> str:
    """The caption after a prefix, with a comma between them unless the prefix ends with a mark."""
    prefix = prefix.strip()
    return f"{prefix}{' ' if prefix[-1] in ',.;:' else ', '}{text}" if prefix else text


def _described(todo: list[data.Example], model: captioners.Captioner) -> Iterator[tuple[list[data.Example], list[str]]]:
    """Batches of examples with their raw captions; threads decode a batch, reduced to the captioner's largest side."""

    def read(example: data.Example):
        image = example.image()
        image.thumbnail((captioners.LARGEST, captioners.LARGEST))
        return image

    with ThreadPoolExecutor(data.THREADS) as pool:
        for start in range(0, len(todo), model.batch):
            batch = todo[start : start + model.batch]
            yield batch, _in_memory(model, list(pool.map(read, batch)))


def _in_memory(model: captioners.Captioner, pictures: list) -> list[str]:
    """The captions of a batch, in halves if the GPU's memory is too small. Raises RuntimeError."""
    from ..memory import gpu

    try:
        return model.describe(pictures)
    except RuntimeError as error:
        if len(pictures) == 1 or not gpu.is_out_of_memory(error):
            raise
    gpu.free()
    half = len(pictures) // 2
    return _in_memory(model, pictures[:half]) + _in_memory(model, pictures[half:])


def _free() -> None:
    from ..memory import gpu

    gpu.free()


def _share(dataset: str | Path, mirror: str | Path | None, show) -> None:
    """Exchanges lines between the captions file and its copy in `mirror`; the own line counts where both have one."""
    if not mirror:
        return
    name = f"captions-{hashlib.sha256(str(dataset).encode()).hexdigest()[:8]}.jsonl"
    try:
        own, copy = captions.Captions(dataset), captions.Captions(dataset, Path(mirror) / name)
        if missing := [row for key, row in copy.rows.items() if key not in own.rows]:
            own.put(missing)
        if newer := [row for key, row in own.rows.items() if copy.rows.get(key) != row]:
            copy.put(newer)
    except OSError as error:
        note(show, f"no copy of the captions is kept in '{mirror}' ({error.strerror or error}); the run continues")
