"""Blind A/B votes: pairs in random order and on random sides, each vote saved to disk, and the result in words."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from .. import files
from ..files import read_lines
from ..measure import metrics
from .album import append_line

EQUAL = "can't tell"


@dataclass(frozen=True)
class Pair:
    """The pictures of two models for one prompt, and the sides on which they are shown."""

    key: str
    prompt: str
    left: str  # the model's label, which the voter doesn't see
    pictures: dict[str, Image.Image]

    @property
    def right(self) -> str:
        return next(label for label in self.pictures if label != self.left)


class Votes:
    """Votes between `models` (two labels) on `drawn` {label: pictures}, in the order of `captions`.

    A pair that has a vote, from this session or another, isn't shown again: its pictures' content identifies it.
    """

    def __init__(self, file: str | Path, drawn: dict[str, list], captions: list[str], models: tuple[str, str],
                 rng: random.Random | None = None):
        self.file, self.models, self.rng = Path(file), tuple(models), rng or random.Random()
        if len(set(self.models)) != 2 or not set(self.models) <= set(drawn):
            raise ValueError(f"a blind vote needs two different models of {', '.join(drawn)}, not {models}")
        files.make_folder(self.file.parent)
        self.pairs = {}
        for prompt, *pictures in zip(captions, *(drawn[label] for label in self.models), strict=True):
            digest = hashlib.sha256(b"".join(picture.tobytes() for picture in pictures)).hexdigest()[:16]
            self.pairs[digest] = (prompt, dict(zip(self.models, pictures, strict=True)))
        known = {row["pair"]: row for row in read_lines(self.file)
                 if isinstance(row.get("pair"), str) and row.get("vote") in (*self.models, EQUAL)}
        self.cast = {key: known[key]["vote"] for key in self.pairs if key in known}
        self.order = [key for key in self.pairs if key not in self.cast]
        self.rng.shuffle(self.order)
        self.side = self.rng.random() < 0.5

    @property
    def current(self) -> Pair | None:
        """The pair to vote on, or None when all are done."""
        if not self.order:
            return None
        prompt, pictures = self.pairs[self.order[0]]
        return Pair(self.order[0], prompt, self.models[self.side], pictures)

    def vote(self, choice: str) -> None:
        """'left', 'right' or 'equal' for the current pair; saved to the disk when this returns.

        Raises OSError, and ValueError when all are done.
        """
        pair = self.current
        if pair is None:
            raise ValueError("every pair has a vote: there is none left to vote on")
        chosen = {"left": pair.left, "right": pair.right, "equal": EQUAL}[choice]
        append_line(self.file, {"pair": pair.key, "prompt": pair.prompt, "left": pair.left, "right": pair.right,
                                "vote": chosen})
        self.cast[pair.key] = chosen
        self.order.pop(0)
        self.side = self.rng.random() < 0.5

    @property
    def preference(self) -> metrics.Figure | None:
        """Percent of the decided votes that went to the second model, with Wilson's interval; None without votes."""
        decided = [vote == self.models[1] for vote in self.cast.values() if vote != EQUAL]
        return metrics.share(decided) if decided else None

    def __str__(self) -> str:
        figure, equal = self.preference, sum(vote == EQUAL for vote in self.cast.values())
        if figure is None:
            return f"No vote for either model yet ({equal} times '{EQUAL}')."
        first, second = self.models
        won = round(figure.value * figure.n / 100)
        if figure.low > 50:
            verdict = f"{second} is preferred"
        elif figure.high < 50:
            verdict = f"{first} is preferred"
        else:
            verdict = "this could be chance alone: vote on more pictures to tell them apart"
        return (f"{second} over {first} in {won} of {figure.n} votes: {figure.value:.0f}% [{figure.low:.0f}, "
                f"{figure.high:.0f}], and {equal} times '{EQUAL}'; {verdict}.")
