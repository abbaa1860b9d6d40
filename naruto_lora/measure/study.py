"""Base and adapters on the same prompts and seeds: draws the pictures to measure, and calculates the figures."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from .. import data, gallery
from . import metrics, similarity
from .encoders import Encoder

UNRELATED = (  # prompts that are far from any style's data set
    "a lighthouse on a rocky coast at sunset",
    "a bowl of oranges on a wooden table",
    "a red bicycle leaning against a brick wall",
    "a snowy mountain behind a lake",
    "a street market in the rain",
    "an old steam locomotive at a station",
    "a sleeping cat on a window sill",
    "a glass skyscraper seen from below",
)
PORTION = 64  # pictures of the data set in memory at once


def draw(pipe, models: dict[str, str], prompts: list[str], per_prompt: int, folder: str | Path, **options) -> dict:
    """{label: pictures} for `models` {label: adapter}, `per_prompt` pictures for each prompt, one after the other.

    Pictures that are in `folder` already are not drawn again; `options` are those of `pipeline.draw`. Picture k has
    seed k for every model: if prompts shared seeds, a model that ignores its prompts would seem to know only a few
    pictures. Raises ValueError, before it draws, for fewer prompts than the figures need.
    """
    if len(prompts) < data.FEWEST:
        raise ValueError(f"a comparison needs {data.FEWEST} prompts or more, and there are {len(prompts)}: "
                         "raise `prompt_count`, or add pictures")
    texts, drawn = repeated(prompts, per_prompt), {}
    for label, adapter in models.items():
        paths = gallery.draw_to(folder, pipe, texts, list(range(len(texts))), adapter, **options)
        drawn[label] = [picture.convert("RGB") for picture in gallery.load(paths)]
    return drawn


def repeated(prompts: list[str], per_prompt: int) -> list[str]:
    """Each prompt `per_prompt` times, one after the other."""
    return [prompt for prompt in prompts for _ in range(per_prompt)]


def embed(encoder: Encoder, drawn: dict[str, list], per_prompt: int) -> dict[str, np.ndarray]:
    """Embeddings {label: (P, S, D)} of the pictures from `draw`."""
    embedded = {label: encoder.embed(pictures) for label, pictures in drawn.items()}
    return {label: rows.reshape(-1, per_prompt, rows.shape[-1]) for label, rows in embedded.items()}


def real(encoder: Encoder, examples: list[data.Example], resolution: int) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings (N, D) and hashes (N, 64) of the data set's pictures, cropped as for training, in small portions."""
    embedded, hashes = [], []
    for start in range(0, len(examples), PORTION):
        pictures = [data.crop(e.image(), resolution)[0] for e in examples[start : start + PORTION]]
        embedded.append(encoder.embed(pictures))
        hashes.append(similarity.dhash(pictures))
    return np.concatenate(embedded), np.concatenate(hashes)


class Comparison:
    """Figures of each model, and of each change from one model to another, paired by prompt."""

    def __init__(self, models: Iterable[str]):
        self.models = list(models)  # labels; the first is the base
        self.figures: dict[str, dict] = {label: {} for label in self.models}
        self.changes: dict[tuple[str, str], dict] = {
            (a, b): {} for k, a in enumerate(self.models) for b in self.models[k + 1 :]
        }

    def add(self, name: str, values: dict[str, np.ndarray]) -> None:
        """Adds a figure: the mean of `values` {label: (N,)}, one value for each picture or prompt."""
        for label in self.models:
            self.figures[label][name] = metrics.mean(values[label])
        for a, b in self.changes:
            self.changes[a, b][name] = metrics.paired(values[a], values[b])

    def add_pictures(self, encoder: Encoder, drawn: dict, prompts: list[str], per_prompt: int, real) -> None:
        """Adds prompt fit, diversity, and style distance to the embeddings `real` (M, D) of real pictures."""
        embedded, texts = embed(encoder, drawn, per_prompt), repeated(prompts, per_prompt)
        fits = {k: encoder.fit(pictures, texts).reshape(len(prompts), -1).mean(1) for k, pictures in drawn.items()}
        self.add("prompt_fit", fits)
        for label in self.models:
            self.figures[label]["style_distance"] = similarity.cmmd(embedded[label], real)
        for a, b in self.changes:
            self.changes[a, b]["style_distance"] = similarity.cmmd_change(embedded[a], embedded[b], real)
        if per_prompt > 1:
            for label in self.models:
                self.figures[label]["diversity"] = similarity.diversity(embedded[label])
            for a, b in self.changes:
                self.changes[a, b]["diversity"] = similarity.diversity_change(embedded[a], embedded[b])

    def add_drift(self, encoder: Encoder, drawn: dict, per_prompt: int) -> None:
        """Adds how far each adapter moves pictures of unrelated prompts; `per_prompt` is 2 or more."""
        embedded = embed(encoder, drawn, per_prompt)
        moved = {label: similarity.moved(embedded[self.models[0]], embedded[label]) for label in self.models[1:]}
        for label, values in moved.items():
            self.figures[label]["drift"] = metrics.mean(values)
        for a, b in self.changes:
            if a in moved:
                self.changes[a, b]["drift"] = metrics.paired(moved[a], moved[b])

    def add_copying(self, encoder: Encoder, drawn: dict, training: tuple, control: dict, holdout: tuple,
                    per_prompt: int) -> None:
        """Adds whether `drawn`, from the first training captions, are memorised training pictures.

        `control` is drawn from the first hold-out captions; `training` and `holdout` are real pictures, from `real`.
        """
        embedded, embedded_control = (embed(encoder, pictures, per_prompt) for pictures in (drawn, control))
        for label in self.models:
            own, other = (similarity.dhash(found[label]).reshape(-1, per_prompt, 64) for found in (drawn, control))
            hashes = own, training[1], other, holdout[1]
            self.figures[label]["copying"] = similarity.copying(
                embedded[label], training[0], embedded_control[label], holdout[0], hashes)

    def add_judged(self, judge: str, drawn: dict, prompts: list[dict]) -> None:
        """Adds a judge's scores: right attributes, pictures in the style, and how legible each attribute is."""
        scores = {label: metrics.scores(judge, pictures, prompts) for label, pictures in drawn.items()}
        self.add("attributes", {label: 100 * np.asarray(found["attributes"]) for label, found in scores.items()})
        self.add("style", {label: 100 * np.asarray(found["style"]) for label, found in scores.items()})
        for label, found in scores.items():
            self.figures[label]["style"] = metrics.share(found["style"])
            legible = {name: metrics.share(hits) for name, hits in found.get("legible", {}).items()}
            self.figures[label] |= {"legible": legible, "n": len(prompts)}

    def legible(self) -> list[dict]:
        """Rows of a table: the percent of pictures in which the judge reads each attribute right."""
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
