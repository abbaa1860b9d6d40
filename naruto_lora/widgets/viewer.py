"""The viewer of drawn pictures: side by side or under a slider, history, favourites. Needs no GPU."""

from __future__ import annotations

import html
from collections.abc import Callable

import ipywidgets as widgets

from ..reading.picture import UNREADABLE
from ..show import compare
from ..show.report import readable
from .album import Album

WIDE = "min(100%, 736px)"


class Viewer:
    """Shows the sets of an album, the newest first; `say(text, wrong)` shows errors to the user."""

    def __init__(self, album: Album, say: Callable):
        self.album, self.say = album, say
        self.shown: dict = {}  # label: picture, as shown
        self.caption = ""  # HTML above the pictures
        self.box = widgets.VBox(self._make())
        self.wanted: dict = {}  # side: label, where the user chose one
        self.filling = False  # True while code, not the user, changes the sides
        self.relist()
        self.refresh()

    def _make(self) -> list:
        self.view = widgets.ToggleButtons(options=["side by side", "slider"], style={"button_width": "112px"})
        self.zoom = widgets.IntSlider(320, min=160, max=800, step=40, description="zoom", continuous_update=False,
                                      layout=widgets.Layout(width="288px"), style={"description_width": "48px"})
        small = {"layout": widgets.Layout(width="224px"), "style": {"description_width": "48px"}}
        self.left = widgets.Dropdown(description="left", **small)
        self.right = widgets.Dropdown(description="right", **small)
        self.pair = row(self.left, self.right)
        self.result = widgets.HTML(layout=widgets.Layout(width="100%"))
        self.history = widgets.Dropdown(description="history", layout=widgets.Layout(width=WIDE),
                                        style={"description_width": "88px"})
        narrow = widgets.Layout(width="auto")
        self.newer = widgets.Button(description="◀ newer", layout=narrow)
        self.older = widgets.Button(description="older ▶", layout=narrow)
        self.favourite = widgets.ToggleButton(description="☆ favourite", layout=widgets.Layout(width="120px"))
        self.only = widgets.Checkbox(False, description="favourites only", indent=False,
                                     layout=widgets.Layout(width="160px"))
        self.newer.on_click(lambda _: self._turn(-1))
        self.older.on_click(lambda _: self._turn(1))
        self.favourite.observe(self._save_favourite, "value")
        self.only.observe(lambda _: self.relist(), "value")
        self.history.observe(lambda _: self.open(), "value")
        for part in (self.view, self.zoom):
            part.observe(lambda _: self.refresh(), "value")
        for side in (self.left, self.right):
            side.observe(self._choose_side, "value")
        return [row(self.view, self.zoom), self.pair, self.result,
                row(self.history, self.newer, self.older, self.favourite, self.only)]

    def relist(self, select: str | None = None) -> None:
        """Updates the history's list; opens the set `select`, if given."""
        here = select or self.history.value
        listed = [name for name in reversed(self.album.sets) if not self.only.value or name in self.album.favourites]
        self.history.options = [(self._title(name), name) for name in listed]
        if listed:  # ipywidgets 7 selects the first by itself, 8 selects none
            self.history.value = here if here in listed else listed[0]
        if select:
            self.open()
        for part in (self.history, self.newer, self.older, self.favourite):
            part.disabled = not listed

    def _title(self, name: str) -> str:
        star, drawn = "★ " if name in self.album.favourites else "", self.album.sets[name]
        return f"{star}{brief(drawn['prompt'], 60)}, seed {drawn['seed']} ({name[:4]})"

    def _turn(self, by: int) -> None:
        names = [value for _, value in self.history.options]
        if self.history.value in names:
            self.history.value = names[max(0, min(len(names) - 1, names.index(self.history.value) + by))]

    def open(self) -> None:
        """Shows the set that is selected in the history."""
        name = self.history.value
        if name not in self.album.sets:
            return
        try:
            self.show(self.album.pictures(name), self.album.sets[name]["prompt"], _settings(self.album.sets[name]))
        except UNREADABLE as error:
            self.say(f"This set's pictures can't be read ({getattr(error, 'strerror', None) or error}).", wrong=True)
        self.favourite.value = name in self.album.favourites

    def _save_favourite(self, change) -> None:
        name = self.history.value
        self.favourite.description = "★ favourite" if change["new"] else "☆ favourite"
        if name in self.album.sets and change["new"] != (name in self.album.favourites):
            try:
                self.album.set_favourite(name, change["new"])
            except OSError as error:
                self.say(f"The favourite can't be saved ({error.strerror or error}).", wrong=True)
            self.relist()

    def show(self, drawn: dict, prompt: str, settings: str = "") -> None:
        """Shows {label: picture} under the prompt and its settings."""
        self.shown = dict(drawn)
        small = f"<div style='opacity:.75;font-size:.9em'>{html.escape(settings)}</div>" if settings else ""
        self.caption = f"<div style='line-height:1.4;margin:4px 0'>{html.escape(readable(prompt))}{small}</div>"
        self.filling, names = True, list(drawn)
        for side, default in ((self.left, names[0]), (self.right, names[-1])):
            side.options = names
            side.value = self.wanted.get(side) if self.wanted.get(side) in names else default
        self.filling = False
        self.refresh()

    def _choose_side(self, change) -> None:
        if not self.filling:
            self.wanted[change["owner"]] = change["new"]
            self.refresh()

    def refresh(self) -> None:
        names = self.left.value, self.right.value
        sliding = self.view.value == "slider" and len(self.shown) > 1
        self.pair.layout.display = "" if sliding else "none"
        if not self.shown:
            self.result.value = "<div style='opacity:.75;padding:8px 0'>No pictures yet.</div>"
        elif sliding and set(names) <= set(self.shown):
            left, right = (self.shown[name] for name in names)
            self.result.value = self.caption + compare.slider(left, right, names, self.zoom.value)
        else:
            self.result.value = self.caption + compare.cards(self.shown, self.zoom.value)


def row(*parts) -> widgets.HBox:
    return widgets.HBox(parts, layout=widgets.Layout(flex_flow="row wrap", align_items="center", width="100%"))


def status(text: str, wrong: bool = False) -> str:
    """HTML of a status line, marked if something went wrong."""
    style = "padding:2px 8px;border-left:4px solid #d33;white-space:pre-wrap" if wrong else ""
    return f"<div role='status' style='line-height:1.4;{style}'>{html.escape(text)}</div>"


def brief(text: str, length: int = 90) -> str:
    text = readable(text)
    return text if len(text) <= length else text[: length - 3].rstrip() + "..."


def _settings(row: dict) -> str:
    texts = {"seed": "seed {}", "steps": "{} steps", "guidance_scale": "guidance {}", "scheduler": "{}",
             "resolution": "{} px"}
    parts = [(text, row[key]) for key, text in texts.items() if key in row]
    return readable(", ".join(text.format(f"{x:g}" if isinstance(x, float) else x) for text, x in parts))
