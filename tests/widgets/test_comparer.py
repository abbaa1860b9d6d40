"""The widgets without a kernel, on ipywidgets 7.7 and 8: tests set values, click buttons and check the state."""

import json
import random
import re
import threading
from types import SimpleNamespace

import pytest
from PIL import Image

from naruto_lora import gallery, pipeline
from naruto_lora.widgets import album, votes
from naruto_lora.widgets.ballot import BlindVote
from naruto_lora.widgets.comparer import PromptComparer

MODELS = {"base": "base", "small": "low", "large": "high"}
COLOURS = {"base": "red", "low": "lime", "high": "blue"}


class Draw:
    """Replaces `pipeline.draw`: plain pictures; its denoising steps wait while a test clears `go`."""

    def __init__(self):
        self.calls, self.go, self.at, self.error = [], threading.Event(), threading.Event(), None
        self.go.set()

    def __call__(self, pipe, prompts, seeds, weights, show, stop, steps, **options):
        self.weights, (adapter, scale) = weights, next(iter(weights.items()))
        self.calls.append((prompts[0], seeds[0], adapter, scale, steps, options))
        if self.error:
            raise self.error
        for step in range(steps):
            self.at.set()
            assert self.go.wait(20)
            if stop():
                return []
            show("drawing", step + 1, steps)
        return [Image.new("RGB", (16, 16), COLOURS[adapter])]


@pytest.fixture
def draw():
    return Draw()


@pytest.fixture
def comparer(tmp_path, draw):
    made = PromptComparer(tmp_path, object(), MODELS, ["a <b> prompt", "the second"], draw, steps=3, batch=7)
    yield made
    draw.go.set()
    made.wait(20)


def generate(comparer):
    comparer.generate.click()
    comparer.wait(20)
    assert not comparer.running


def test_generate_draws_with_each_model_then_shows_and_saves_the_pictures(comparer, draw, tmp_path):
    comparer.seed.value, comparer.strengths["small"].value = 5, 0.5
    generate(comparer)
    assert [call[:5] for call in draw.calls] == [("a <b> prompt", 5, name, scale, 3) for name, scale in
                                                 (("base", 1), ("low", 0.5), ("high", 1))]
    assert draw.calls[0][5] == {"guidance_scale": 5.0, "scheduler": "euler", "batch": 7}
    assert list(comparer.viewer.shown) == ["base", "small at 0.5", "large"]
    result = comparer.viewer.result.value
    assert result.count("<img") == 3 and "small at 0.5" in result and "a &lt;b&gt; prompt" in result
    assert "seed 5, 3 steps, guidance 5, euler, 16 px" in result
    assert comparer.progress.value == 1 and "Drawn in" in comparer.status.value
    assert len(list(tmp_path.glob("*.png"))) == 3 and len(comparer.viewer.history.options) == 1


def test_the_labels_are_those_of_other_programs(comparer):
    assert comparer.sampler.description == "sampler" and comparer.strengths["small"].description == "strength"
    assert comparer.next_prompt.description == "next suggestion" and comparer.viewer.zoom.description == "zoom"


def test_two_clicks_start_one_run_and_no_setting_can_be_changed_while_it_draws(comparer, draw):
    draw.go.clear()
    comparer.generate.click()
    assert draw.at.wait(20) and comparer.generate.disabled and not comparer.stop.disabled
    assert all(p.disabled for p in (comparer.prompt, comparer.seed, comparer.next_seed, comparer.strengths["small"]))
    comparer.generate.click()
    comparer.start()
    comparer.next_seed.click()
    draw.go.set()
    comparer.wait(20)
    assert len(draw.calls) == 3 and comparer.seed.value == 0
    assert not comparer.generate.disabled and comparer.stop.disabled and not comparer.prompt.disabled


def test_a_second_widget_waits_for_the_first(comparer, draw, tmp_path):
    other = PromptComparer(tmp_path, comparer.pipe, MODELS, ["x"], draw, steps=3)
    draw.go.clear()
    comparer.generate.click()
    assert draw.at.wait(20)
    other.generate.click()
    assert "Another widget is drawing" in other.status.value and not other.running
    draw.go.set()
    comparer.wait(20)
    generate(other)
    assert "Drawn in" in other.status.value and len(draw.calls) == 6


def test_lcm_is_offered_only_with_its_adapter_and_draws_without_guidance(tmp_path, draw):
    pipe = SimpleNamespace(unet=SimpleNamespace(peft_config={"lcm": None}))
    made = PromptComparer(tmp_path, pipe, MODELS, ["x"], draw, steps=30)
    made.sampler.value = "lcm"
    assert (made.steps.value, made.guidance.value, made.guidance.disabled) == (4, 1, True)
    generate(made)
    assert draw.weights == {"high": 1, "lcm": 1}
    made.sampler.value = "ddim"
    assert (made.steps.value, made.guidance.value, made.guidance.disabled) == (30, 5, False)
    assert "lcm" not in PromptComparer(tmp_path, object(), MODELS, ["x"], draw).sampler.options


def test_stop_ends_the_drawing_and_generate_works_again(comparer, draw):
    draw.go.clear()
    comparer.generate.click()
    assert draw.at.wait(20)
    comparer.stop.click()
    draw.go.set()
    comparer.wait(20)
    assert len(draw.calls) == 1 and "Stopped after 0 of 3 pictures" in comparer.status.value
    assert not comparer.viewer.history.options and not comparer.generate.disabled
    generate(comparer)
    assert len(draw.calls) == 4 and len(comparer.viewer.history.options) == 1


def test_an_exception_after_stop_is_not_shown(comparer, draw):
    draw.go.clear()
    comparer.generate.click()
    assert draw.at.wait(20)
    comparer.stop.click()
    draw.error = RuntimeError("stopped")
    draw.go.set()
    comparer.wait(20)
    assert "Stopped after" in comparer.status.value and "RuntimeError" not in comparer.status.value


def test_an_error_is_shown_beside_the_buttons_and_escaped(comparer, draw):
    draw.error = RuntimeError("CUDA out of <memory>")
    generate(comparer)
    assert "RuntimeError: CUDA out of &lt;memory&gt;" in comparer.status.value
    assert comparer.progress.bar_style == "danger" and not comparer.generate.disabled
    draw.error = None
    generate(comparer)
    assert "Drawn in" in comparer.status.value and comparer.progress.bar_style == "success"


def test_invalid_settings_cannot_be_chosen(comparer):
    comparer.prompt.value = "  "
    assert comparer.generate.disabled and "Write a prompt" in comparer.status.value
    comparer.prompt.value = "x"
    assert not comparer.generate.disabled and "Write" not in comparer.status.value
    for choice in comparer.chosen.values():
        choice.value = False
    assert comparer.generate.disabled and "at least one model" in comparer.status.value
    comparer.chosen["base"].value = True
    assert not comparer.generate.disabled and comparer.strengths["small"].disabled
    comparer.steps.value, comparer.guidance.value = 0, 99
    assert comparer.steps.value == 1 and comparer.guidance.value == 15
    assert "base" not in comparer.strengths and comparer.strengths["large"].max == 1.5


def test_next_seed_and_next_prompt(comparer, draw):
    comparer.next_seed.click()
    comparer.wait(20)
    comparer.next_prompt.click()
    comparer.wait(20)
    assert [call[:2] for call in draw.calls[::3]] == [("a <b> prompt", 1), ("the second", 1)]
    comparer.suggestion.value = 0
    assert comparer.prompt.value == "a <b> prompt"


def test_the_history_can_be_browsed_without_a_gpu(comparer, tmp_path):
    for seed in (1, 2):
        comparer.seed.value = seed
        generate(comparer)
    comparer.viewer.favourite.value = True
    later = PromptComparer(tmp_path)
    titles = [title for title, _ in later.viewer.history.options]
    assert ["seed 2" in title for title in titles] == [True, False] and titles[0].startswith("★")
    assert list(later.viewer.shown) == list(MODELS) and later.viewer.favourite.value
    assert "No model is loaded" in later.status.value
    later.viewer.older.click()
    assert "seed 1," in later.viewer.result.value and not later.viewer.favourite.value
    later.viewer.older.click()  # the end
    later.viewer.newer.click()
    later.viewer.only.value = True
    assert len(later.viewer.history.options) == 1
    later.viewer.favourite.value = False
    assert later.viewer.history.options == () and json.loads((tmp_path / "favourites.json").read_text()) == []
    later.start()  # does nothing without a model


def test_results_under_a_slider(comparer):
    generate(comparer)
    view = comparer.viewer
    assert view.pair.layout.display == "none" and "<input" not in view.result.value
    view.view.value = "slider"
    assert view.pair.layout.display == "" and view.result.value.count("<img") == 2 and "<input" in view.result.value
    assert (view.left.value, view.right.value) == ("base", "large")
    view.right.value = "small"
    assert 'alt="small"' in view.result.value
    comparer.seed.value = 3
    generate(comparer)
    assert view.right.value == "small" and 'alt="small"' in view.result.value  # the user's choice stays


def test_incomplete_lines_and_missing_pictures_are_skipped(tmp_path):
    kept = album.Album(tmp_path)
    first, second = (kept.add({"prompt": "é", "seed": k}, {"base": Image.new("RGB", (8, 8))}) for k in (1, 2))
    assert kept.add({"prompt": "é", "seed": 1}, {"base": Image.new("RGB", (8, 8))}) == first  # once in the list
    with open(tmp_path / "sets.jsonl", "a", encoding="utf-8") as file:
        file.write('{"id": "cut')
    (tmp_path / kept.sets[first]["pictures"]["base"]).unlink()
    again = album.Album(tmp_path)
    assert list(again.sets) == [second]
    third = again.add({"prompt": "x", "seed": 3}, {"base": Image.new("RGB", (8, 8))})
    assert list(album.Album(tmp_path).sets) == [second, third]


@pytest.fixture
def ballot(tmp_path):
    drawn = {name: [Image.new("RGB", (8, 8), (value, k, 0)) for k in range(6)]
             for name, value in (("base", 0), ("LoRA", 255))}
    captions = [f"<prompt {k}>" for k in range(6)]
    return lambda seed=0: BlindVote(votes.Votes(tmp_path / "votes.jsonl", drawn, captions, ("base", "LoRA"),
                                                random.Random(seed)))


def side_of(ballot, model):
    return "left" if ballot.votes.current.left == model else "right"


def test_votes_count_are_saved_and_not_asked_again(ballot):
    first, asked = ballot(), []
    for k in range(4):
        asked.append(first.votes.current.key)
        if k < 2:
            first.buttons[side_of(first, "LoRA")].click()
        else:
            first.keys.value = {"left": "1", "right": "2"}[side_of(first, "LoRA")] if k == 2 else "0"
            assert first.keys.value == ""
    assert list(first.votes.cast.values()) == ["LoRA"] * 3 + [votes.EQUAL]
    second = ballot(1)  # another day
    assert second.votes.cast == first.votes.cast and "4 of 6" in second.status.value
    while second.votes.current:
        asked.append(second.votes.current.key)
        second.vote(side_of(second, "base"))
    assert len(set(asked)) == 6 and second.buttons["left"].disabled and second.keys.disabled
    assert "LoRA over base in 3 of 5 votes: 60% [23, 88], and 1 times" in second.status.value
    assert "chance alone" in second.status.value


def test_a_vote_is_blind(ballot):
    sides = set()
    for seed in range(12):
        box = ballot(seed)
        sides.add(box.votes.current.left)
        shown = re.sub(r"base64,[^\"]+", "", box.question.value)  # the pictures' bytes may spell anything
        assert "LoRA" not in shown and "base" not in shown and "&lt;prompt" in shown
        assert re.findall(r'alt="(\w+)"', shown) == ["left", "right"]
        assert "LoRA" not in box.status.value and "%" not in box.status.value
    assert sides == {"base", "LoRA"}
    assert len({ballot(seed).votes.current.key for seed in range(12)}) > 2
    box = ballot()
    box.keys.value = "x"
    assert not box.votes.cast and box.keys.value == ""
    box.reveal.click()
    assert "No vote for either model" in box.status.value


def test_a_model_is_preferred_only_if_the_interval_excludes_one_half(ballot):
    box = ballot()
    while box.votes.current:
        box.vote(side_of(box, "LoRA"))
    assert "LoRA over base in 6 of 6 votes: 100% [61, 100]" in box.status.value
    assert "LoRA is preferred" in box.status.value
    with pytest.raises(ValueError, match="two different models of base, LoRA"):
        votes.Votes(box.votes.file, {"base": [], "LoRA": []}, [], ("base", "base"))


def test_a_real_pipeline_works_after_stop_and_draws_the_same_as_pipeline_draw(pipe, tmp_path):
    settings = dict(steps=4, guidance_scale=2.0, resolution=32)
    shown_phases = []

    def stopping(*rest, show, stop, **options):
        def shown(phase, done, total):
            shown_phases.append(phase)
            show(phase, done, total)
            if len(shown_phases) == 2:
                made.stop.click()

        return pipeline.draw(*rest, show=shown, stop=stop, **options)

    made = PromptComparer(tmp_path, pipe, {"base": "base", "LoRA": "style"}, ["a man smiling"], stopping, **settings)
    made.seed.value, made.strengths["LoRA"].value = 3, 0.8
    generate(made)
    assert "Stopped after 0 of 2" in made.status.value and len(shown_phases) == 2
    generate(made)
    assert "Drawn in" in made.status.value
    expected = [pipeline.draw(pipe, ["a man smiling"], 3, name, scale, **settings)[0] for name, scale in
                (("base", 1), ("style", 0.8))]
    assert [p.tobytes() for p in made.viewer.shown.values()] == [p.tobytes() for p in expected]
    kept = next(iter(album.Album(tmp_path).sets.values()))["pictures"]["LoRA at 0.8"]
    assert gallery.redraw(pipe, tmp_path / kept).tobytes() == expected[1].tobytes()
