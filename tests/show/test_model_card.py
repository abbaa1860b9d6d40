"""The model card and the page: what letters and private paths become in them."""

import json

import pytest
import yaml
from PIL import Image

from naruto_lora.show import model_card, page

ODD = ["\x7f\x80\x9f\ufffe\uffff", "one\x85two\u2028three\u2029four", "\u202eevil\u2066\u2069", "\ufeffé 少女 😀",
       "\x1b[31m"]


def written(folder, prompt, **changes):
    recipe = {"name": "mine", "rank": 4, "dataset": "/home/ann/faces", "base": "/home/ann/base", "vae": "/home/ann/vae"}
    record = {"figures": {"base": {}, "mine": {}}, "verdict": [], "runs": [], "settings": {}, "encoder": "CLIP"}
    drawn = {name: [Image.new("RGB", (8, 8))] for name in ("base", "mine")}
    run = {"recipe": recipe | changes}
    return model_card.write(folder, run, record, "mine", drawn, [prompt]).read_text(encoding="utf-8")


@pytest.mark.parametrize("prompt", ODD)
def test_every_letter_of_a_caption_survives_in_the_cards_header(tmp_path, prompt):
    text = written(tmp_path, prompt)
    front, body = text.split("---\n")[1:3]
    assert yaml.safe_load(front)["widget"] == [{"text": prompt, "output": {"url": "images/0.jpg"}}]
    assert all(letter.isprintable() or letter in "\n\u200b" for letter in text)
    assert ("少女 😀" in front) == ("😀" in prompt)  # readable letters stay readable
    assert prompt not in body or prompt.isprintable()


def test_a_cards_text_has_no_path_of_this_machine(tmp_path):
    text = written(tmp_path, "a man")
    assert "/home/ann" not in text and 'from_pretrained("THE_VAE"' in text and 'from_pretrained("THE_BASE"' in text
    assert 'from_pretrained("me/vae"' in written(tmp_path, "a man", vae="me/vae")
    assert "AutoencoderKL" not in written(tmp_path, "a man", vae="")


def test_a_caption_with_half_a_surrogate_can_be_written(tmp_path):
    text = written(tmp_path, "a \ud800 man")
    assert r'"text": "a \ud800 man"' in text and 'pipe("a  man"' in text


def test_a_page_has_no_letter_that_turns_its_text_around(tmp_path):
    record = {"figures": {}, "changes": {}, "verdict": [], "encoder": "CLIP", "fit_means": "x", "settings": {},
              "seeds": [0], "runs": [{"model": "\u202emine\x1b[2J"}], "machine": []}
    drawn = {name: [Image.new("RGB", (8, 8))] for name in ("base", "\u202emine")}
    file = page.write(tmp_path / "compare.html", record, drawn, ["half \ud800\x1b[31m a \u2067man"])
    text = file.read_text(encoding="utf-8")
    assert "<p>half [31m a man</p>" in text and "mine[2J" in text
    assert not set(text) & set("\x1b\u202e\u2067")
    assert json.dumps(text)
