"""Blind votes in the notebook: two pictures without names, a vote by click or key, the result on request."""

from __future__ import annotations

import html

import ipywidgets as widgets

from ..show import compare
from ..show.report import readable
from .viewer import row, status
from .votes import EQUAL, Votes

KEYS = {"1": "left", "2": "right", "0": "equal"}


class BlindVote:
    """Uses only core ipywidgets. `votes` saves each vote, so that a later session continues with the other pairs."""

    def __init__(self, votes: Votes, size: int = 360):
        self.votes, self.size = votes, size
        self.question, self.status = widgets.HTML(layout=widgets.Layout(width="100%")), widgets.HTML()
        texts = {"left": "◀ left (1)", "equal": f"{EQUAL} (0)", "right": "right (2) ▶"}
        self.buttons = {choice: widgets.Button(description=text, layout=widgets.Layout(width="auto"))
                        for choice, text in texts.items()}
        for choice, button in self.buttons.items():
            button.on_click(lambda _, choice=choice: self.vote(choice))
        self.keys = widgets.Text(placeholder="or click here and type 1, 2 or 0", layout=widgets.Layout(width="256px"))
        self.keys.observe(self._typed, "value")
        self.reveal = widgets.Button(description="show the result", layout=widgets.Layout(width="auto"))
        self.reveal.on_click(lambda _: self._say(str(self.votes)))
        self.box = widgets.VBox([self.question, row(*self.buttons.values(), self.keys), row(self.reveal, self.status)],
                                layout=widgets.Layout(max_width="960px"))
        self._ask()

    def vote(self, choice: str) -> None:
        """'left', 'right' or 'equal' for the pair that is shown."""
        if self.votes.current is None:
            return
        try:
            self.votes.vote(choice)
        except OSError as error:
            self._say(f"The vote can't be saved ({error.strerror or error}): make room and vote again.", wrong=True)
            return
        self._ask()

    def _typed(self, change) -> None:
        if not change["new"]:
            return
        self.keys.value = ""
        if choice := KEYS.get(change["new"][-1]):
            self.vote(choice)

    def _ask(self) -> None:
        pair, done, total = self.votes.current, len(self.votes.cast), len(self.votes.pairs)
        for part in (*self.buttons.values(), self.keys):
            part.disabled = pair is None
        if pair is None:
            self.question.value = "<div style='padding:8px 0'>You have voted on all pairs. Thank you!</div>"
            self._say(str(self.votes))
            return
        pictures = {"left": pair.pictures[pair.left], "right": pair.pictures[pair.right]}
        asked = f"Which picture do you prefer for <b>{html.escape(readable(pair.prompt))}</b>?"
        cards = compare.cards(pictures, self.size)
        self.question.value = f"<div style='line-height:1.4;margin:4px 0'>{asked}</div>{cards}"
        self._say(f"You have voted on {done} of {total} pairs; the votes are saved in {self.votes.file.name}.")

    def _say(self, text: str, wrong: bool = False) -> None:
        self.status.value = status(text, wrong)
