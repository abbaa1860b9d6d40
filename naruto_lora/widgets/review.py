"""Captions reviewed in the notebook: picture, caption, next; search and replace; undo. Saved as typed."""

from __future__ import annotations

import html
from pathlib import Path

import ipywidgets as widgets

from ..reading.picture import UNREADABLE
from ..show import compare
from ..show.report import readable
from .edits import Edits
from .viewer import row, status


class Review:
    """Uses only core ipywidgets; `box` shows it. Tab goes from the caption to the buttons, Enter presses one."""

    def __init__(self, dataset: str | Path, size: int = 448):
        self.edits, self.size, self.here = Edits(dataset), size, 0
        self.filling = False  # True while code, not the user, sets the caption
        wide = widgets.Layout(width="min(calc(100% - 8px), 736px)")
        self.picture, self.status = widgets.HTML(layout=widgets.Layout(width="100%")), widgets.HTML()
        self.caption = widgets.Textarea(description="caption", rows=3, layout=wide, style={"description_width": "64px"},
                                        placeholder="what the picture shows")  # fmt: skip
        self.next, self.previous = self._button("next ▶", 1), self._button("◀ previous", -1)
        self.find_missing = self._button("next without caption", self._to_missing)
        self.no_words = self._button("use without words", self._without_words)
        self.undo = self._button("undo", self._undo)
        self.number = widgets.BoundedIntText(1, min=1, max=len(self.edits), description="picture",
                                             layout=widgets.Layout(width="144px"), style={"description_width": "56px"})
        text = {"layout": widgets.Layout(width="272px"), "style": {"description_width": "64px"}}
        self.find = widgets.Text(description="find", **text)
        self.put = widgets.Text(description="replace", **text)
        self.replace = self._button("replace in all captions", self._replace)
        self.caption.observe(self._typed, "value")
        self.number.observe(lambda change: self.go(change["new"] - 1), "value")
        self.box = widgets.VBox(
            [self.picture, self.caption, row(self.next, self.previous, self.number, self.undo),
             row(self.no_words, self.find_missing), row(self.find, self.put, self.replace), self.status],
            layout=widgets.Layout(max_width="960px"))  # fmt: skip
        self.go(0)
        self._say("Captions are saved as you type.")

    def _button(self, text: str, act) -> widgets.Button:
        button = widgets.Button(description=text, layout=widgets.Layout(width="auto"))
        button.on_click(lambda _: self.go(self.here + act) if isinstance(act, int) else act())
        return button

    def go(self, index: int) -> None:
        """Shows the picture `index`, counted from 0 and around the ends, with its caption."""
        self.edits.leave()
        self.here = index % len(self.edits)
        self.number.value = self.here + 1
        example = self.edits.examples[self.here]
        try:
            image = example.image()
        except (ValueError, *UNREADABLE) as error:
            self.picture.value = status(str(error), wrong=True)
        else:
            name, about = html.escape(readable(example.name)), f"{image.width} x {image.height} px"
            image.thumbnail((self.size, self.size))
            self.picture.value = (
                f'<img src="{compare.data_url(image)}" alt="{name}" style="height:{self.size // 2 + 96}px;'
                'max-width:100%;object-fit:contain;object-position:left;display:block;margin:0">'
                f'<div style="line-height:1.4">{self.here + 1} of {len(self.edits):,}: {name}, {about}</div>'
            )
        self._fill()

    def _fill(self) -> None:
        """The caption as it is on disk."""
        self.filling = True
        self.caption.value = self.edits.texts[self.here] or ""
        self.filling = False
        self.undo.disabled = not self.edits.before
        self.find_missing.disabled = not self.edits.missing()

    def _typed(self, change) -> None:
        if self.filling:
            return
        if self._saved(lambda: self.edits.type(self.here, change["new"])):
            self._say("Saved." if change["new"] else "Saved: this picture is used without words.")
        self.undo.disabled = not self.edits.before

    def _without_words(self) -> None:
        if self._saved(lambda: self.edits.no_words(self.here)):
            self._say("Saved: this picture is used without words.")
        self._fill()

    def _to_missing(self) -> None:
        missing = self.edits.missing()
        if missing:
            self.go(next((k for k in missing if k > self.here), missing[0]))

    def _replace(self) -> None:
        changed: list[int] = []
        if self._saved(lambda: changed.extend(self.edits.replace(self.find.value, self.put.value))):
            where = f" of {len(self.edits):,} captions" if self.find.value else ": write in `find` what to search"
            self._say(f"Replaced in {len(changed):,}{where}." + (" `undo` takes it back." if changed else ""))
        self._fill()

    def _undo(self) -> None:
        changed: list[int] = []
        if self._saved(lambda: changed.extend(self.edits.undo())) and changed:
            self.go(self.here if self.here in changed else changed[0])
            self._say(f"Undone in {len(changed):,} caption{'s' * (len(changed) != 1)}.")

    def _saved(self, act) -> bool:
        """Whether `act` could save; says what is wrong if not."""
        try:
            act()
        except OSError as error:
            self._say(f"The caption can't be saved ({error.strerror or error}): make room and type again.", wrong=True)
            return False
        return True

    def _say(self, text: str, wrong: bool = False) -> None:
        self.status.value = status(text, wrong)
