"""Try prompts in the notebook: base and adapters side by side from one seed, progress, Stop, a history on disk."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import ipywidgets as widgets

from ..progress import duration
from .album import Album
from .viewer import WIDE, Viewer, brief, row, status

STEPS, GUIDANCE, SCALE = (1, 100), (1.0, 15.0), (0.0, 1.5)
BUSY: dict[int, threading.Lock] = {}  # by the pipeline's id: a cell that is run again makes a second widget


class PromptComparer:
    """Core ipywidgets alone, versions 7.7 and 8. Pictures are drawn in a thread, so that Stop is heard.

    `models` is {label: adapter's name in `pipe`, or 'base'}, `prompts` are suggestions, `look` the settings to begin
    with: steps, guidance_scale, scheduler, resolution. Without a `pipe` the pictures of before can be looked at. What
    goes wrong is said beside the buttons. While it draws, no other cell should use `pipe`.
    """

    def __init__(self, folder: str | Path, pipe=None, models: dict[str, str] | None = None, prompts=(),
                 draw: Callable | None = None, **look):
        self.album, self.pipe, self.models = Album(folder), pipe, models or {}
        self.prompts, self.look = list(prompts), {"steps": 30, "guidance_scale": 5.0, "scheduler": "euler"} | look
        self.draw = draw or _pipeline_draw
        self.stopping, self.thread, self.lock = threading.Event(), None, threading.Lock()
        self.busy = BUSY.setdefault(id(pipe), threading.Lock())
        self.status, self.reason = widgets.HTML(), ""  # what `_check` last wrote there
        self.viewer = Viewer(self.album, self._say)
        parts = self._make_settings() if pipe is not None else [self.status]
        self.box = widgets.VBox([*parts, self.viewer.box], layout=widgets.Layout(max_width="1152px"))
        if pipe is None:
            self._say("No model is loaded: these are the pictures drawn before.")

    # what can be chosen

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
        self.steps = widgets.BoundedIntText(self.look["steps"], min=STEPS[0], max=STEPS[1], description="steps",
                                            layout=number, **label)
        self.guidance = widgets.BoundedFloatText(
            self.look["guidance_scale"], min=GUIDANCE[0], max=GUIDANCE[1], step=0.5, description="guidance",
            layout=number, **label)
        with_lcm = LCM in getattr(getattr(self.pipe, "unet", None), "peft_config", {})
        self.scheduler = widgets.Dropdown(
            options=list(WITH_LCM if with_lcm else SCHEDULERS), value=self.look["scheduler"], description="scheduler",
            layout=widgets.Layout(width="224px"), **label)
        self.scheduler.observe(self._suit_lcm, "value")
        self.chosen = {name: widgets.Checkbox(True, description=name, indent=False,
                                              layout=widgets.Layout(width="176px")) for name in self.models}
        self.scales = {
            name: widgets.FloatSlider(1.0, min=SCALE[0], max=SCALE[1], step=0.05, readout_format=".2f",
                                      continuous_update=False, description="scale", style={"description_width": "48px"})
            for name, adapter in self.models.items() if adapter != "base"
        }
        rows = [row(self.chosen[name], *([self.scales[name]] if name in self.scales else [])) for name in self.models]
        self.suggestion.observe(self._suggest, "value")
        for part in (self.prompt, *self.chosen.values(), *self.scales.values()):
            part.observe(lambda _: self._check(), "value")
        buttons = self._make_buttons()
        self._check()
        return [self.prompt, self.suggestion, row(self.seed, self.steps, self.guidance, self.scheduler), *rows,
                *buttons]

    def _make_buttons(self) -> list:
        self.generate = _button("Generate", self.start, "primary")
        self.stop = _button("Stop", self.halt, "warning", disabled=True)
        self.next_seed = _button("same prompt, next seed", self._with_next_seed)
        self.next_prompt = _button("same seed, new prompt", self._with_next_prompt)
        self.progress = widgets.FloatProgress(min=0, max=1, layout=widgets.Layout(width="224px"))
        return [row(self.generate, self.stop, self.next_seed, self.next_prompt), row(self.progress, self.status)]

    def _suit_lcm(self, change) -> None:
        """LCM draws in few steps, without guidance; back from it come the settings of before."""
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
        """Locks what makes no sense now, and says why nothing can be drawn."""
        for name, scale in self.scales.items():
            scale.disabled = self.running or not self.chosen[name].value
        reason = ""
        if not self.prompt.value.strip():
            reason = "Write a prompt, or choose one."
        elif not any(choice.value for choice in self.chosen.values()):
            reason = "Choose at least one model."
        blocked = self.running or bool(reason)
        self.generate.disabled = self.next_seed.disabled = blocked
        self.next_prompt.disabled = self.running or not self.prompts or "model" in reason
        self.stop.disabled = not self.running
        for part in (self.prompt, self.suggestion, self.seed, self.steps, self.guidance, self.scheduler,
                     *self.chosen.values()):
            part.disabled = self.running
        self.guidance.disabled = self.running or self.scheduler.value == "lcm"
        if not self.running and (reason or self.status.value == self.reason):
            self._say(reason)
            self.reason = self.status.value

    # drawing

    @property
    def running(self) -> bool:
        return self.lock.locked()

    def start(self) -> None:
        """Draws what is chosen, in a thread; a second call while it draws does nothing."""
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
                    "guidance_scale": self.guidance.value, "scheduler": self.scheduler.value}
        chosen = [(name, self.models[name], self.scales[name].value if name in self.scales else 1.0)
                  for name in self.models if self.chosen[name].value]
        self.thread = threading.Thread(target=self._run, args=(settings, chosen), daemon=True)
        self.thread.start()

    def halt(self) -> None:
        """Asks the drawing to end at its next denoising step."""
        self.stopping.set()
        self._say("Stopping ...")

    def wait(self, seconds: float | None = None) -> None:
        """Returns when nothing is being drawn."""
        if self.thread:
            self.thread.join(seconds)

    def _run(self, settings: dict, chosen: list[tuple[str, str, float]]) -> None:
        drawn, begun, wrong = {}, time.time(), False
        try:
            self._draw_all(settings, chosen, drawn, begun)
            if not self.stopping.is_set():
                self._keep(settings, chosen, drawn)
                told = f"Drawn in {duration(time.time() - begun)}."
        except Exception as error:  # shown where the user looks; the thread has nobody else to tell
            wrong, told = True, f"{type(error).__name__}: {error}"
        if self.stopping.is_set():
            wrong, told = False, f"Stopped after {len(drawn)} of {len(chosen)} pictures; the history keeps whole sets."
        self.progress.bar_style = "danger" if wrong else "" if self.stopping.is_set() else "success"
        self.busy.release()
        self.lock.release()
        self._check()
        self._say(told, wrong)

    def _draw_all(self, settings: dict, chosen: list, drawn: dict, begun: float) -> None:
        options = {key: value for key, value in settings.items() if key not in ("prompt", "seed")}
        more = {key: value for key, value in self.look.items() if key not in options}
        for k, (label, adapter, scale) in enumerate(chosen):
            if self.stopping.is_set():
                return

            def show(phase: str, done: int, total: int, k=k, label=label, **_) -> None:
                what = f"{label} ({k + 1} of {len(chosen)}), step {done} of {total}"
                self._advance((k + done / max(1, total)) / len(chosen), what, begun)

            show("", 0, settings["steps"])
            weights = {adapter: scale} | ({"lcm": 1.0} if settings["scheduler"] == "lcm" else {})
            found = self.draw(self.pipe, [settings["prompt"]], [settings["seed"]], weights, show=show,
                              stop=self.stopping.is_set, **options, **more)
            if found and not self.stopping.is_set():
                drawn[_label(label, scale)] = found[0]
                self.viewer.show(drawn, settings["prompt"])

    def _advance(self, share: float, what: str, begun: float) -> None:
        self.progress.value = max(self.progress.value, share)  # a picture's own end isn't told as a step back
        left = (time.time() - begun) * (1 - share) / share if share > 0.02 else None
        if not self.stopping.is_set():
            self._say(f"drawing {what}" + (f", {duration(left)} left" if left is not None else " ..."))

    def _keep(self, settings: dict, chosen: list, drawn: dict) -> None:
        used = {_label(label, scale): [adapter, scale] for label, adapter, scale in chosen}
        settings = settings | {"resolution": next(iter(drawn.values())).width, "models": used}
        name = self.album.add(settings, drawn)
        self.progress.value = 1.0
        self.viewer.relist(select=name)

    def _say(self, text: str, wrong: bool = False) -> None:
        self.status.value = status(text, wrong)


def _button(text: str, act: Callable, kind: str = "", disabled: bool = False) -> widgets.Button:
    made = widgets.Button(description=text, button_style=kind, disabled=disabled, layout=widgets.Layout(width="auto"))
    made.on_click(lambda _: act())
    return made


def _pipeline_draw(*rest, **options):
    from .. import pipeline

    return pipeline.draw(*rest, **options)


def _label(label: str, scale: float) -> str:
    return label if scale == 1 else f"{label} at {scale:g}"
