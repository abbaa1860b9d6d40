"""Prompts in the notebook: base and LoRAs side by side from one seed, progress, Stop, a history on disk."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import ipywidgets as widgets

from ..progress import duration
from .album import Album
from .viewer import WIDE, Viewer, brief, row, status

STEPS, GUIDANCE, STRENGTH = (1, 100), (1.0, 15.0), (0.0, 1.5)
BUSY: dict[int, threading.Lock] = {}  # by the pipeline's id: running the cell again creates a second widget


class PromptComparer:
    """Uses only core ipywidgets, versions 7.7 and 8. Draws in a thread, so that Stop works.

    `models` is {label: adapter's name in `pipe`, or 'base'}, `prompts` are suggestions, `settings` the values to start
    with: steps, guidance_scale, scheduler, resolution. Without a `pipe` it shows earlier pictures only. Errors appear
    beside the buttons. While it draws, no other cell should use `pipe`.
    """

    def __init__(self, folder: str | Path, pipe=None, models: dict[str, str] | None = None, prompts=(),
                 draw: Callable | None = None, **settings):
        self.album, self.pipe, self.models = Album(folder), pipe, models or {}
        self.prompts, self.draw = list(prompts), draw or _pipeline_draw
        self.defaults = {"steps": 30, "guidance_scale": 5.0, "scheduler": "euler"} | settings
        self.thread: threading.Thread | None = None
        self.stopping, self.lock = threading.Event(), threading.Lock()
        self.busy = BUSY.setdefault(id(pipe), threading.Lock())
        self.status, self.reason = widgets.HTML(), ""  # the HTML that `_check` last wrote there
        self.viewer = Viewer(self.album, self._say)
        parts = self._make_settings() if pipe is not None else [self.status]
        self.box = widgets.VBox([*parts, self.viewer.box], layout=widgets.Layout(max_width="1152px"))
        if pipe is None:
            self._say("No model is loaded: only earlier pictures are shown.")

    # settings

    def _make_settings(self) -> list:
        from ..pipeline import LCM, SCHEDULERS, WITH_LCM

        wide, number = widgets.Layout(width=WIDE), widgets.Layout(width="176px")
        label = {"style": {"description_width": "88px"}}
        self.prompt = widgets.Textarea(self.prompts[0] if self.prompts else "", description="prompt", rows=2,
                                       placeholder="what to draw", layout=wide, **label)
        self.suggestion = widgets.Dropdown(
            options=[("choose one ...", -1)] + [(brief(text), k) for k, text in enumerate(self.prompts)],
            value=-1, description="suggestions", layout=wide, **label)
        self.seed = widgets.BoundedIntText(0, min=0, max=2**31 - 1, description="seed", layout=number, **label)
        self.steps = widgets.BoundedIntText(self.defaults["steps"], min=STEPS[0], max=STEPS[1], description="steps",
                                            layout=number, **label)
        self.guidance = widgets.BoundedFloatText(
            self.defaults["guidance_scale"], min=GUIDANCE[0], max=GUIDANCE[1], step=0.5, description="guidance",
            layout=number, **label)
        with_lcm = LCM in getattr(getattr(self.pipe, "unet", None), "peft_config", {})
        self.sampler = widgets.Dropdown(
            options=list(WITH_LCM if with_lcm else SCHEDULERS), value=self.defaults["scheduler"], description="sampler",
            layout=widgets.Layout(width="224px"), **label)
        self.sampler.observe(self._set_for_lcm, "value")
        self.chosen = {name: widgets.Checkbox(True, description=name, indent=False,
                                              layout=widgets.Layout(width="176px")) for name in self.models}
        self.strengths = {
            name: widgets.FloatSlider(1.0, min=STRENGTH[0], max=STRENGTH[1], step=0.05, continuous_update=False,
                                      readout_format=".2f", description="strength", style={"description_width": "64px"})
            for name, adapter in self.models.items() if adapter != "base"
        }
        rows = [row(*(parts[name] for parts in (self.chosen, self.strengths) if name in parts)) for name in self.models]
        self.suggestion.observe(self._suggest, "value")
        for part in (self.prompt, *self.chosen.values(), *self.strengths.values()):
            part.observe(lambda _: self._check(), "value")
        buttons = self._make_buttons()
        self._check()
        return [self.prompt, self.suggestion, row(self.seed, self.steps, self.guidance, self.sampler), *rows,
                *buttons]

    def _make_buttons(self) -> list:
        self.generate = _button("Generate", self.start, "primary")
        self.stop = _button("Stop", self.halt, "warning", disabled=True)
        self.next_seed = _button("next seed", self._with_next_seed)
        self.next_prompt = _button("next suggestion", self._with_next_prompt)
        self.progress = widgets.FloatProgress(min=0, max=1, layout=widgets.Layout(width="224px"))
        return [row(self.generate, self.stop, self.next_seed, self.next_prompt), row(self.progress, self.status)]

    def _set_for_lcm(self, change) -> None:
        """LCM draws in few steps without guidance; any other sampler gets the earlier settings back."""
        if change["new"] == "lcm":
            self.before_lcm = self.steps.value, self.guidance.value
            self.steps.value, self.guidance.value = 4, 1.0
        elif change["old"] == "lcm":
            self.steps.value, self.guidance.value = self.before_lcm
        self._check()

    def _suggest(self, change) -> None:
        if change["new"] >= 0:
            self.prompt.value = self.prompts[change["new"]]

    def _with_next_seed(self) -> None:
        if not self.running:
            self.seed.value += 1
            self.start()

    def _with_next_prompt(self) -> None:
        if not self.running and self.prompts:
            here = self.prompts.index(self.prompt.value) if self.prompt.value in self.prompts else -1
            self.prompt.value = self.prompts[(here + 1) % len(self.prompts)]
            self.start()

    def _check(self) -> None:
        """Disables what can't be used now, and says why nothing can be drawn."""
        for name, strength in self.strengths.items():
            strength.disabled = self.running or not self.chosen[name].value
        reason = ""
        if not self.prompt.value.strip():
            reason = "Write a prompt, or choose a suggestion."
        elif not any(choice.value for choice in self.chosen.values()):
            reason = "Choose at least one model."
        blocked = self.running or bool(reason)
        self.generate.disabled = self.next_seed.disabled = blocked
        self.next_prompt.disabled = self.running or not self.prompts or "model" in reason
        self.stop.disabled = not self.running
        for part in (self.prompt, self.suggestion, self.seed, self.steps, self.guidance, self.sampler,
                     *self.chosen.values()):
            part.disabled = self.running
        self.guidance.disabled = self.running or self.sampler.value == "lcm"
        if not self.running and (reason or self.status.value == self.reason):
            self._say(reason)
            self.reason = self.status.value

    # drawing

    @property
    def running(self) -> bool:
        return self.lock.locked()

    def start(self) -> None:
        """Draws with the chosen models, in a thread; while it draws, a second call does nothing."""
        if self.pipe is None or self.generate.disabled or not self.lock.acquire(blocking=False):
            return
        if not self.busy.acquire(blocking=False):
            self.lock.release()
            self._say("Another widget is drawing with this model: stop it there, or wait.", wrong=True)
            return
        self.stopping.clear()
        self._check()
        self.progress.value, self.progress.bar_style = 0.0, ""
        settings = {"prompt": self.prompt.value.strip(), "seed": self.seed.value, "steps": self.steps.value,
                    "guidance_scale": self.guidance.value, "scheduler": self.sampler.value}
        chosen = [(name, self.models[name], self.strengths[name].value if name in self.strengths else 1.0)
                  for name in self.models if self.chosen[name].value]
        self.thread = threading.Thread(target=self._run, args=(settings, chosen), daemon=True)
        self.thread.start()

    def halt(self) -> None:
        """Stops the drawing at its next denoising step."""
        self.stopping.set()
        self._say("Stopping ...")

    def wait(self, seconds: float | None = None) -> None:
        """Waits until nothing is being drawn."""
        if self.thread:
            self.thread.join(seconds)

    def _run(self, settings: dict, chosen: list[tuple[str, str, float]]) -> None:
        drawn, begun, wrong = dict[str, list](), time.time(), False
        try:
            self._draw_all(settings, chosen, drawn, begun)
            if not self.stopping.is_set():
                self._keep(settings, chosen, drawn)
                text = f"Drawn in {duration(time.time() - begun)}."
        except Exception as error:  # shown beside the buttons: an exception in a thread would not be seen
            wrong, text = True, f"{type(error).__name__}: {error}"
        if self.stopping.is_set():
            wrong, text = False, f"Stopped after {len(drawn)} of {len(chosen)} pictures; only full sets are kept."
        self.progress.bar_style = "danger" if wrong else "" if self.stopping.is_set() else "success"
        self.busy.release()
        self.lock.release()
        self._check()
        self._say(text, wrong)

    def _draw_all(self, settings: dict, chosen: list, drawn: dict, begun: float) -> None:
        options = {key: value for key, value in settings.items() if key not in ("prompt", "seed")}
        more = {key: value for key, value in self.defaults.items() if key not in options}
        for k, (label, adapter, strength) in enumerate(chosen):
            if self.stopping.is_set():
                return

            def show(phase: str, done: int, total: int, k=k, label=label, **_) -> None:
                what = f"{label} ({k + 1} of {len(chosen)}), step {done} of {total}"
                self._advance((k + done / max(1, total)) / len(chosen), what, begun)

            show("", 0, settings["steps"])
            weights = {adapter: strength} | ({"lcm": 1.0} if settings["scheduler"] == "lcm" else {})
            found = self.draw(self.pipe, [settings["prompt"]], [settings["seed"]], weights, show=show,
                              stop=self.stopping.is_set, **options, **more)
            if found and not self.stopping.is_set():
                drawn[_label(label, strength)] = found[0]
                self.viewer.show(drawn, settings["prompt"])

    def _advance(self, share: float, what: str, begun: float) -> None:
        self.progress.value = max(self.progress.value, share)  # the bar never moves back
        left = (time.time() - begun) * (1 - share) / share if share > 0.02 else None
        if not self.stopping.is_set():
            self._say(f"drawing {what}" + (f", {duration(left)} left" if left is not None else " ..."))

    def _keep(self, settings: dict, chosen: list, drawn: dict) -> None:
        used = {_label(label, strength): [adapter, strength] for label, adapter, strength in chosen}
        settings = settings | {"resolution": next(iter(drawn.values())).width, "models": used}
        name = self.album.add(settings, drawn)
        self.progress.value = 1.0
        self.viewer.relist(select=name)

    def _say(self, text: str, wrong: bool = False) -> None:
        self.status.value = status(text, wrong)


def _button(text: str, act: Callable, kind: str = "", disabled: bool = False) -> widgets.Button:
    button = widgets.Button(description=text, button_style=kind, disabled=disabled, layout=widgets.Layout(width="auto"))
    button.on_click(lambda _: act())
    return button


def _pipeline_draw(*rest, **options):
    from .. import pipeline

    return pipeline.draw(*rest, **options)


def _label(label: str, strength: float) -> str:
    return label if strength == 1 else f"{label} at {strength:g}"
