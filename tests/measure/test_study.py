"""A comparison: its figures, its verdict in words, its page and its model card."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from naruto_lora import data, files
from naruto_lora.measure import encoders, metrics, similarity, study, verdict
from naruto_lora.show import compare, model_card, page
from naruto_lora.tiny import world

LABELS = ["base", "small <b>", "large"]
ASKED = world.prompts(4, seed=6)
TEXTS, PER_PROMPT = [p["text"] for p in ASKED], 2
JUDGE = "naruto_lora.tiny.judge"


def drawings(style, seed, people=ASKED):
    """Each person with each seed, in the order of `study.draw`."""
    rng = np.random.default_rng(seed)
    return [world.draw(p["attributes"], style, rng, 64) for p in people for _ in range(PER_PROMPT)]


@pytest.fixture(scope="module")
def drawn():
    return {"base": drawings("flat", 0), "small <b>": drawings("flat", 1), "large": drawings(world.STYLE, 2)}


@pytest.fixture(scope="module")
def result(drawn):
    encoder, rng = encoders.load(JUDGE), np.random.default_rng(1)
    held = [world.draw(p["attributes"], world.STYLE, rng, 64) for p in world.prompts(12, seed=7)]
    real = encoder.embed(held), similarity.dhash(held)
    made = study.Comparison(LABELS)
    losses = rng.gamma(2, 1, 12)
    made.add("holdout_loss", {"base": losses, "small <b>": losses - 0.01 * rng.normal(size=12), "large": losses - 0.3})
    made.add_pictures(encoder, drawn, TEXTS, PER_PROMPT, real[0])
    made.add_drift(encoder, drawn, PER_PROMPT)
    made.add_copying(encoder, drawn, real, drawn, real, PER_PROMPT)
    made.add_judged(JUDGE, {label: pictures[::2] for label, pictures in drawn.items()}, ASKED)
    return made


@pytest.fixture(scope="module")
def run(trained):
    return json.loads((trained.folder / "run.json").read_text())


@pytest.fixture(scope="module")
def record(result, run):
    runs = {"small <b>": run | {"seconds": 60}, "large": run | {"seconds": 240}}
    encoder, settings = encoders.load(JUDGE), {"steps": 16, "guidance_scale": 2.0, "show": print}
    machine = [{"what": "GPU", "here": "none"}]
    prompts = ["<script>alert(1)</script>", *TEXTS[1:]]
    return page.summary(result, runs, encoder, settings, list(range(8)), prompts, machine)


def test_each_model_and_each_change_has_every_figure(result):
    assert set(result.figures["large"]) >= {"holdout_loss", "prompt_fit", "style_distance", "diversity", "drift",
                                            "copying", "attributes", "style", "legible"}
    assert "drift" not in result.figures["base"]
    assert list(result.changes) == [("base", "small <b>"), ("base", "large"), ("small <b>", "large")]
    assert result.changes["base", "large"]["style_distance"].value < -0.5
    assert result.figures["large"]["drift"].value > result.figures["small <b>"]["drift"].value
    assert result.changes["base", "large"]["holdout_loss"].value == pytest.approx(-0.3)
    assert result.figures["large"]["style"].value == 100 and result.figures["base"]["style"].value == 0
    assert [row["attribute"] for row in result.legible()][:2] == ["subject", "hair color"]


def test_a_models_figures_are_calculated_from_its_pictures(result, drawn):
    encoder = encoders.load(JUDGE)
    fits = encoder.fit(drawn["large"], [text for text in TEXTS for _ in range(PER_PROMPT)])
    assert result.figures["large"]["prompt_fit"] == metrics.mean(fits.reshape(4, 2).mean(1))
    embedded = encoder.embed(drawn["large"]).reshape(4, 2, -1)
    assert result.figures["large"]["diversity"] == similarity.diversity(embedded)


def test_the_fewest_allowed_hold_out_pictures_are_enough_for_every_figure(drawn):
    encoder = encoders.load(JUDGE)
    few = {label: pictures[: data.FEWEST * PER_PROMPT] for label, pictures in drawn.items()}
    rng = np.random.default_rng(3)
    held = [world.draw(p["attributes"], world.STYLE, rng, 64) for p in world.prompts(data.FEWEST, seed=8)]
    real = encoder.embed(held), similarity.dhash(held)
    made = study.Comparison(LABELS)
    made.add_pictures(encoder, few, TEXTS[: data.FEWEST], PER_PROMPT, real[0])
    made.add_drift(encoder, few, PER_PROMPT)
    made.add_copying(encoder, few, real, few, real, PER_PROMPT)
    assert made.changes["base", "large"]["style_distance"].value < 0
    assert made.figures["large"]["copying"].n == data.FEWEST
    with pytest.raises(ValueError, match="needs 3 prompts or more, and there are 2: raise `prompt_count`"):
        study.draw(None, {}, TEXTS[: data.FEWEST - 1], PER_PROMPT, "nowhere")


def test_json_keeps_the_hold_out_gain_beside_the_model(result, tmp_path):
    read = files.read_json(files.write_json(tmp_path / "c.json", result.as_json()))
    assert read["models"]["large"]["gain"]["value"] == pytest.approx(-0.3) and "gain" not in read["models"]["base"]
    assert read["changes"]["large against base"]["prompt_fit"]["n"] == 4
    assert read["models"]["large"]["legible"]["eyes"]["n"] == 4


def figure(value, half):
    return metrics.Figure(value, value - half, value + half, 8)


def test_the_verdict_names_gain_loss_noise_and_cost():
    changes = {"style_distance": figure(-2, 1), "prompt_fit": figure(-3, 1), "drift": figure(1, 0.5),
               "diversity": figure(0.1, 0.2), "legible": {}}
    assert verdict.words(changes, "256", "1024", 62.5) == (
        "1024 against 256, for 62.5 more minutes of training: better in style distance by 2; worse in prompt fit by 3; "
        "different in drift by 1; within noise in diversity.")
    assert verdict.words({"prompt_fit": figure(0, 1)}, "a", "b") == "b against a: no clear difference in prompt fit."
    assert "for 3 fewer minutes" in verdict.words(changes, "a", "b", -3)


def test_a_change_counts_by_the_stricter_interval():
    assert verdict.judge("prompt_fit", figure(1.2, 1)) == "within noise"  # 95% would leave out 0
    assert verdict.judge("prompt_fit", figure(1.4, 1)) == "better"
    assert verdict.judge("holdout_loss", figure(1.4, 1)) == "worse"
    assert verdict.judge("prompt_fit", figure(0, 0)) == "within noise"


def test_every_metric_says_what_it_cannot_say(result):
    shown = verdict.limits(result.figures)
    assert len(shown) == len(verdict.rows(result.figures)) == 8
    assert all(row["it says"] and row["it can't say"] for row in shown)


def test_the_page_is_self_contained_and_escapes_all_text(record, drawn, tmp_path):
    sheets = {"<Curves>": Image.new("RGB", (8, 8))}
    file = page.write(tmp_path / "c.html", record, drawn, record["prompts"], sheets)
    text = file.read_text()
    assert "<script" not in text and "&lt;script&gt;alert(1)" in text and "small <b>" not in text
    assert "<Curves>" not in text and "&lt;Curves&gt;" in text
    assert not re.search(r"""(src|href)=["'](?!data:)""", text) and "default-src 'none'" in text
    assert text.count("<figure") == 3 * 4 * 2 and 'name="viewport"' in text and "prefers-color-scheme: dark" in text
    for sentence in record["verdict"]:
        assert sentence.replace("<b>", "&lt;b&gt;") in text
    assert "3 more minutes" in text and JUDGE in text and "n = 4" in text
    assert [path.name for path in tmp_path.iterdir()] == ["c.html"]


def test_the_record_is_json(record, tmp_path):
    read = files.read_json(files.write_json(tmp_path / "c.json", record))
    assert read["seeds"] == list(range(8)) and read["recipes"]["large"]["legs"] and read["machine"][0]["what"] == "GPU"
    assert len(read["curves"]["large"]["losses"]) == 6
    assert read["figures"]["large"]["style_distance"]["n"] == 4


def test_the_model_card_has_pictures_and_escapes_captions(record, run, drawn, tmp_path):
    run = run | {"recipe": run["recipe"] | {"base": "stabilityai/stable-diffusion-xl-base-1.0", "vae": "a/vae",
                                            "dataset": "some/data"}}
    prompts = ['quoted "text": [x](y)\n# head', *TEXTS[1:]]
    text = model_card.write(tmp_path, run, record, "large", drawn, prompts).read_text()
    front, body = text.split("---\n")[1:]
    fields = dict(line.split(": ", 1) for line in front.strip().splitlines())
    values = {key: json.loads(value) for key, value in fields.items()}
    assert values["base_model"] == "stabilityai/stable-diffusion-xl-base-1.0" and values["license"] == "openrail++"
    assert values["datasets"] == ["some/data"] and "lora" in values["tags"]
    assert values["widget"][0]["text"] == prompts[0]
    for entry in values["widget"]:
        assert Image.open(tmp_path / entry["output"]["url"]).size == (64, 64)
    assert Image.open(tmp_path / "images" / "compare.jpg").width > 128
    assert "large against base" in body and "small" not in body and "\n# head" not in body
    source = re.search(r"```python\n(.*?)```", body, re.DOTALL)[1]
    compile(source, "card", "exec")
    assert 'vae=vae' in source and "AutoencoderKL.from_pretrained(\"a/vae\"" in source


def test_a_local_base_and_data_set_are_not_published(record, run, drawn, tmp_path):
    text = model_card.write(tmp_path, run, record, "large", drawn, TEXTS).read_text()
    assert run["recipe"]["base"] not in text and run["recipe"]["dataset"] not in text
    assert "base_model" not in text and "license" not in text and "AutoencoderKL" not in text


def test_drawn_sets_are_kept_and_not_drawn_again(pipe, tmp_path, monkeypatch):
    options = dict(steps=2, guidance_scale=2.0, resolution=32)
    first = study.draw(pipe, {"base": "base", "LoRA": "style"}, TEXTS[:3], PER_PROMPT, tmp_path, **options)
    assert [len(pictures) for pictures in first.values()] == [6, 6] and len(list(tmp_path.glob("*.png"))) == 12
    monkeypatch.setattr(study.gallery.pipeline, "_draw_batch", None)  # nothing is left to draw
    again = study.draw(pipe, {"base": "base", "LoRA": "style"}, TEXTS[:3], PER_PROMPT, tmp_path, **options)
    assert [p.tobytes() for p in again["LoRA"]] == [p.tobytes() for p in first["LoRA"]]
    assert first["base"][0].tobytes() != first["LoRA"][0].tobytes()


def test_real_pictures_are_embedded_in_portions(examples, monkeypatch):
    encoder = encoders.load(JUDGE)
    whole = study.real(encoder, examples[0][:5], 32)
    monkeypatch.setattr(study, "PORTION", 2)
    parts = study.real(encoder, examples[0][:5], 32)
    np.testing.assert_allclose(whole[0], parts[0], atol=1e-5)
    assert (whole[1] == parts[1]).all() and whole[1].shape == (5, 64)


def test_the_nearest_pair_is_shown(examples):
    found = similarity.Copying(1, 1, 1, 0.001, [(0, 2, 0.1)])
    sheet = compare.nearest(found, [Image.new("RGB", (32, 32), "red")], examples[0])
    assert sheet.width > 400 and (np.asarray(sheet) == [255, 0, 0]).all(-1).any()
