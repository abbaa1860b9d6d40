"""Base and adapters on the same prompts and seeds: what is drawn to measure on, and the figures from it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from .. import data, gallery
from . import metrics, similarity
from .encoders import Encoder

UNRELATED = (  # prompts that no style's data set is about
    "a lighthouse on a rocky coast at sunset",
    "a bowl of oranges on a wooden table",
    "a red bicycle leaning against a brick wall",
    "a snowy mountain behind a lake",
    "a street market in the rain",
    "an old steam locomotive at a station",
    "a sleeping cat on a window sill",
    "a glass skyscraper seen from below",
)
PORTION = 64  # pictures of the data set that are in memory at once


def draw(pipe, models: dict[str, str], prompts: list[str], each: int, folder: str | Path, **look) -> dict:
    """{label: pictures}, `each` a prompt in a row, for `models` {label: adapter}; from `folder` what is there.

    Picture k has seed k for every model: were seeds common to prompts, a model that ignores its prompts would seem
    to know a handful of pictures. Raises ValueError for fewer prompts than the figures need, before any is drawn.
    """
    if len(prompts) < data.FEWEST:
        raise ValueError(f"a comparison needs {data.FEWEST} prompts or more, and there are {len(prompts)}: "
                         "raise `prompt_count`, or add pictures")
    texts, drawn = repeated(prompts, each), {}
    for label, adapter in models.items():
        paths = gallery.draw_to(folder, pipe, texts, list(range(len(texts))), adapter, **look)
        drawn[label] = [_opened(path) for path in paths]
    return drawn


def _opened(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGB")


def repeated(prompts: list[str], each: int) -> list[str]:
    """Every prompt `each` times, in a row."""
    return [prompt for prompt in prompts for _ in range(each)]


def embed(encoder: Encoder, drawn: dict[str, list], each: int) -> dict[str, np.ndarray]:
    """{label: (P, S, D)} of what `draw` gave."""
    parts = {label: encoder.embed(pictures) for label, pictures in drawn.items()}
    return {label: part.reshape(-1, each, part.shape[-1]) for label, part in parts.items()}


def real(encoder: Encoder, examples: list[data.Example], resolution: int) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings (N, D) and hashes (N, 64) of the data set's pictures, cropped as for training; a few in memory."""
    embedded, hashes = [], []
    for start in range(0, len(examples), PORTION):
        pictures = [data.crop(e.image(), resolution)[0] for e in examples[start : start + PORTION]]
        embedded.append(encoder.embed(pictures))
        hashes.append(similarity.dhash(pictures))
    return np.concatenate(embedded), np.concatenate(hashes)


class Comparison:
    """Figures of each model, and of each change from one model to another, in pairs by prompt."""

    def __init__(self, models: Iterable[str]):
        self.models = list(models)  # labels, the base's first
        self.figures: dict[str, dict] = {label: {} for label in self.models}
        self.changes: dict[tuple[str, str], dict] = {
            (a, b): {} for k, a in enumerate(self.models) for b in self.models[k + 1 :]
        }

    def add(self, name: str, values: dict[str, np.ndarray]) -> None:
        """A figure that is the mean of one value a picture or prompt, {label: (N,)}."""
        for label in self.models:
            self.figures[label][name] = metrics.mean(values[label])
        for a, b in self.changes:
            self.changes[a, b][name] = metrics.paired(values[a], values[b])

    def add_pictures(self, encoder: Encoder, drawn: dict, prompts: list[str], each: int, held) -> None:
        """Prompt fit, style distance to the real pictures' embeddings `held` (M, D), and diversity of `draw`'s."""
        seen, texts = embed(encoder, drawn, each), repeated(prompts, each)
        fits = {k: encoder.fit(pictures, texts).reshape(len(prompts), -1).mean(1) for k, pictures in drawn.items()}
        self.add("prompt_fit", fits)
        for label in self.models:
            self.figures[label]["style_distance"] = similarity.cmmd(seen[label], held)
        for a, b in self.changes:
            self.changes[a, b]["style_distance"] = similarity.cmmd_change(seen[a], seen[b], held)
        if each > 1:
            for label in self.models:
                self.figures[label]["diversity"] = similarity.diversity(seen[label])
            for a, b in self.changes:
                self.changes[a, b]["diversity"] = similarity.diversity_change(seen[a], seen[b])

    def add_drift(self, encoder: Encoder, drawn: dict, each: int) -> None:
        """How far each adapter moves `drawn`, two pictures or more of each unrelated prompt."""
        seen = embed(encoder, drawn, each)
        moved = {label: similarity.moved(seen[self.models[0]], seen[label]) for label in self.models[1:]}
        for label, values in moved.items():
            self.figures[label]["drift"] = metrics.mean(values)
        for a, b in self.changes:
            if a in moved:
                self.changes[a, b]["drift"] = metrics.paired(moved[a], moved[b])

    def add_copying(self, encoder: Encoder, again: dict, training: tuple, drawn: dict, held: tuple, each: int) -> None:
        """Whether `again`, drawn from the first training captions, are training pictures learnt by heart.

        The control is `drawn`, from the first hold-out captions; the sets of real pictures are as `real` gives them.
        """
        seen, control = embed(encoder, again, each), embed(encoder, drawn, each)
        for label in self.models:
            own, other = (similarity.dhash(found[label]).reshape(-1, each, 64) for found in (again, drawn))
            hashes = own, training[1], other, held[1]
            found = similarity.copying(seen[label], training[0], control[label], held[0], hashes)
            self.figures[label]["copying"] = found

    def add_judged(self, judge: str, drawn: dict, prompts: list[dict]) -> None:
        """Where a judge knows the truth: attributes right, pictures in the style, and each attribute's legibility."""
        found = {label: metrics.scores(judge, pictures, prompts) for label, pictures in drawn.items()}
        self.add("attributes", {label: 100 * np.asarray(each["attributes"]) for label, each in found.items()})
        self.add("style", {label: 100 * np.asarray(each["style"]) for label, each in found.items()})
        for label, each in found.items():
            self.figures[label]["style"] = metrics.share(each["style"])
            legible = {name: metrics.share(hits) for name, hits in each.get("legible", {}).items()}
            self.figures[label] |= {"legible": legible, "n": len(prompts)}

    def legible(self) -> list[dict]:
        """Rows of a table: in what percent of pictures each attribute is read right."""
        names = next(iter(self.figures.values())).get("legible", {})
        return [{"attribute": name.replace("_", " ")} | {k: str(f["legible"][name]) for k, f in self.figures.items()}
                for name in names]

    def as_json(self) -> dict:
        """{"models": ..., "changes": ...} for `files.write_json`; a model's "gain" is its hold-out loss's change."""
        models = {label: dict(figures) for label, figures in self.figures.items()}
        for (a, b), changes in self.changes.items():
            if a == self.models[0] and "holdout_loss" in changes:
                models[b]["gain"] = changes["holdout_loss"]
        return {"models": models, "changes": {f"{b} against {a}": found for (a, b), found in self.changes.items()}}
