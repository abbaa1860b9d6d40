"""Drawn sets to look at in the notebook: side by side or under a slider, a history, favourites. Needs no GPU."""

from __future__ import annotations

import html
from collections.abc import Callable

import ipywidgets as widgets

from ..show import compare
from .album import Album

WIDE = "min(100%, 736px)"


class Viewer:
    """Shows the sets of an album, the newest first; `say(text, wrong)` is where trouble is told."""

    def __init__(self, album: Album, say: Callable):
        self.album, self.say = album, say
        self.shown: dict = {}  # label: picture, as the results show them
        self.caption = ""  # HTML above the pictures
        self.box = widgets.VBox(self._make())
        self.wanted: dict = {}  # side: label, where somebody chose one
        self.filling = False
        self.relist()
        self.refresh()

    def _make(self) -> list:
        self.view = widgets.ToggleButtons(options=["side by side", "slider"], style={"button_width": "112px"})
        self.zoom = widgets.IntSlider(320, min=160, max=800, step=40, description="size", continuous_update=False,
                                      layout=widgets.Layout(width="288px"), style={"description_width": "48px"})
        small = {"layout": widgets.Layout(width="224px"), "style": {"description_width": "48px"}}
        self.left = widgets.Dropdown(description="left", **small)
        self.right = widgets.Dropdown(description="right", **small)
        self.pair = row(self.left, self.right)
        self.result = widgets.HTML(layout=widgets.Layout(width="100%"))
        self.history = widgets.Dropdown(description="history", layout=widgets.Layout(width=WIDE),
                                        style={"description_width": "88px"})
        step = widgets.Layout(width="auto")
        self.newer = widgets.Button(description="◀ newer", layout=step)
        self.older = widgets.Button(description="older ▶", layout=step)
        self.favourite = widgets.ToggleButton(description="☆ keep", layout=widgets.Layout(width="96px"))
        self.only = widgets.Checkbox(False, description="favourites only", indent=False,
                                     layout=widgets.Layout(width="160px"))
        self.newer.on_click(lambda _: self._turn(-1))
        self.older.on_click(lambda _: self._turn(1))
        self.favourite.observe(self._favour, "value")
        self.only.observe(lambda _: self.relist(), "value")
        self.history.observe(lambda _: self.open(), "value")
        for part in (self.view, self.zoom):
            part.observe(lambda _: self.refresh(), "value")
        for side in (self.left, self.right):
            side.observe(self._chosen, "value")
        return [row(self.view, self.zoom), self.pair, self.result,
                row(self.history, self.newer, self.older, self.favourite, self.only)]

    def relist(self, select: str | None = None) -> None:
        """Reads the history afresh; opens the set `select`."""
        here = select or self.history.value
        listed = [name for name in reversed(self.album.sets) if not self.only.value or name in self.album.favourites]
        self.history.options = [(self._title(name), name) for name in listed]
        if listed:  # ipywidgets 7 takes the first by itself, 8 none
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
        """Shows the set that the history names."""
        name = self.history.value
        if name not in self.album.sets:
            return
        try:
            self.show(self.album.pictures(name), self.album.sets[name]["prompt"], _settings(self.album.sets[name]))
        except OSError as error:
            self.say(f"This set's pictures can't be read ({error.strerror or error}).", wrong=True)
        self.favourite.value = name in self.album.favourites

    def _favour(self, change) -> None:
        name = self.history.value
        self.favourite.description = "★ kept" if change["new"] else "☆ keep"
        if name in self.album.sets and change["new"] != (name in self.album.favourites):
            try:
                self.album.keep(name, change["new"])
            except OSError as error:
                self.say(f"The favourite can't be saved ({error.strerror or error}).", wrong=True)
            self.relist()

    def show(self, drawn: dict, prompt: str, settings: str = "") -> None:
        """Shows {label: picture} under their prompt."""
        self.shown = dict(drawn)
        small = f"<div style='opacity:.75;font-size:.9em'>{html.escape(settings)}</div>" if settings else ""
        self.caption = f"<div style='line-height:1.4;margin:4px 0'>{html.escape(prompt)}{small}</div>"
        self.filling, names = True, list(drawn)
        for side, default in ((self.left, names[0]), (self.right, names[-1])):
            side.options = names
            side.value = self.wanted.get(side) if self.wanted.get(side) in names else default
        self.filling = False
        self.refresh()

    def _chosen(self, change) -> None:
        if not self.filling:
            self.wanted[change["owner"]] = change["new"]
            self.refresh()

    def refresh(self) -> None:
        names = self.left.value, self.right.value
        sliding = self.view.value == "slider" and len(self.shown) > 1
        self.pair.layout.display = "" if sliding else "none"
        if not self.shown:
            self.result.value = "<div style='opacity:.75;padding:8px 0'>Nothing is drawn yet.</div>"
        elif sliding and set(names) <= set(self.shown):
            pair = [self.shown[name] for name in names]
            self.result.value = self.caption + compare.slider(*pair, names, self.zoom.value)
        else:
            self.result.value = self.caption + compare.cards(self.shown, self.zoom.value)


def row(*parts) -> widgets.HBox:
    return widgets.HBox(parts, layout=widgets.Layout(flex_flow="row wrap", align_items="center", width="100%"))


def status(text: str, wrong: bool = False) -> str:
    """HTML of a line that says how things stand, marked where something went wrong."""
    style = "padding:2px 8px;border-left:4px solid #d33;white-space:pre-wrap" if wrong else ""
    return f"<div role='status' style='line-height:1.4;{style}'>{html.escape(text)}</div>"


def brief(text: str, length: int = 90) -> str:
    return text if len(text) <= length else text[: length - 3].rstrip() + "..."


def _settings(row: dict) -> str:
    return (f"seed {row['seed']}, {row['steps']} steps, guidance {row['guidance_scale']:g}, {row['scheduler']}, "
            f"{row['resolution']} px")
