"""Captioners in the layouts of their hub repositories, with few random weights: the code that loads the real ones."""

import json
import sys
import types

import numpy as np
import pytest
import tiny_captioners
import torch
from PIL import Image

from naruto_lora import hub
from naruto_lora.captioning import captioners

PICTURES = [Image.effect_noise((50, 40 + 9 * k), 60 + 20 * k).convert("RGB") for k in range(3)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(kind):
        if kind == "tagger":
            pytest.importorskip("timm")
        if kind not in made:
            made[kind] = getattr(tiny_captioners, kind)(tmp_path_factory.mktemp(kind))
        return made[kind]

    return folder


@pytest.mark.parametrize("kind", ["blip", "florence"])
def test_a_caption_is_the_same_alone_in_a_batch_and_again(folders, kind):
    one, other = captioners.load(str(folders(kind))), captioners.load(str(folders(kind)))
    found = one.describe(PICTURES)
    assert len(found) == 3 and len(set(found)) > 1 and all(found)
    assert [one.describe([picture])[0] for picture in PICTURES] == found == other.describe(PICTURES)


def test_blip_gets_what_its_own_processor_gives(folders):
    from transformers import AutoProcessor, BlipForConditionalGeneration

    folder = folders("blip")
    processor = AutoProcessor.from_pretrained(folder)
    model = BlipForConditionalGeneration.from_pretrained(folder).eval()
    inputs = processor(images=PICTURES, return_tensors="pt")
    ours = captioners._pixels(PICTURES, 32, json.loads((folder / "preprocessor_config.json").read_text()), model)
    assert (ours - inputs["pixel_values"]).abs().mean() < 0.02 and ours.shape == inputs["pixel_values"].shape
    tokens = model.generate(pixel_values=ours, min_new_tokens=5, **captioners.DECODING)
    texts = processor.batch_decode(tokens, skip_special_tokens=True)
    assert captioners.load(str(folder)).describe(PICTURES) == [text.strip() for text in texts]


def test_florence_gets_what_its_own_processor_gives(folders, monkeypatch):
    from transformers import BartTokenizer, CLIPImageProcessor, Florence2ForConditionalGeneration, Florence2Processor

    folder, seen = folders("florence"), {}
    tokenizer = BartTokenizer.from_pretrained(folder)
    tokenizer.image_token, tokenizer.image_token_id = "<image>", tokenizer.convert_tokens_to_ids("<image>")
    images = CLIPImageProcessor.from_pretrained(folder)
    images.image_seq_length = 5
    processor = Florence2Processor(image_processor=images, tokenizer=tokenizer)
    expected = processor(text=["<DETAILED_CAPTION>"] * 3, images=PICTURES, return_tensors="pt")
    generate = Florence2ForConditionalGeneration.generate
    monkeypatch.setattr(Florence2ForConditionalGeneration, "generate",
                        lambda self, **given: seen.update(given) or generate(self, **given))  # fmt: skip
    captioners.load(str(folder)).describe(PICTURES)
    assert torch.equal(seen["input_ids"], expected["input_ids"])
    assert (seen["pixel_values"] - expected["pixel_values"]).abs().mean() < 0.02


def test_a_tagger_names_what_is_likely_the_likeliest_first_and_no_rating(folders, tmp_path):
    assert captioners.load(str(folders("tagger"))).describe(PICTURES) == ["long hair, naruto (series), ^_^"] * 3
    unsure = captioners.load(str(tiny_captioners.tagger(tmp_path, favourite=[0, 1])))
    assert unsure.describe(PICTURES[:1]) == [""]


def test_a_tagger_gets_a_white_square_in_blue_green_red(folders, monkeypatch):
    timm = pytest.importorskip("timm")

    folder, seen = folders("tagger"), []
    create = timm.create_model

    def created(*names, **options):
        model = create(*names, **options)
        model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        return model

    monkeypatch.setattr(timm, "create_model", created)
    captioners.load(str(folder)).describe([Image.new("RGB", (64, 32), "red")])
    (pixels,) = seen
    assert pixels.shape == (1, 3, 64, 64)
    assert pixels[0, :, 32, 32].tolist() == [-1, -1, 1] and pixels[0, :, 2, 32].tolist() == [1, 1, 1]


def test_weights_that_do_not_fit_are_refused_not_drawn_at_random(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    for file in folders("blip").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    save_file({f"other.{name}": value for name, value in weights.items()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"has not the layout of BlipForConditionalGeneration: \d+ weights such as .* "
                                         r"are missing; choose blip or florence-2$"):  # fmt: skip
        captioners.load(str(tmp_path))


def test_pickled_weights_are_never_read(folders, tmp_path):
    for file in folders("blip").iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="can't be loaded .*safetensors.*; check its files") as caught:
        captioners.load(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name, kind, said", [
    ("bilp", ValueError, "no captioner is called 'bilp'; choose blip, florence-2, wd, a hub id, a folder or a module"),
    ("json", ValueError, "no captioner is called 'json'"),
    ("no/repository", FileNotFoundError, "the model 'no/repository' is no folder here, and can't be downloaded"),
])  # fmt: skip
def test_a_captioner_that_is_none_is_named(name, kind, said):
    with pytest.raises(kind, match=said) as caught:
        captioners.load(name)
    assert "\n" not in str(caught.value)


def test_a_hub_model_is_downloaded_without_pickles_and_loaded_from_its_folder(folders, monkeypatch):
    asked, there = [], []

    def folder(repository, kind):
        if not there:
            raise FileNotFoundError
        return folders("blip")

    monkeypatch.setattr(hub, "folder", folder)
    monkeypatch.setattr(hub.Download, "run", lambda download, show: asked.append(download) or there.append(True))
    assert captioners.load("blip").name == "blip" and captioners.load("blip").describe(PICTURES)
    (download,) = asked  # the second time it is here
    assert (download.repository, download.kind) == ("Salesforce/blip-image-captioning-large", "model")
    assert {"config.json", "model.safetensors"} <= set(download.names) and not any("bin" in n for n in download.names)


def test_a_folder_of_another_model_is_named(base, tmp_path):
    with pytest.raises(FileNotFoundError, match="is no captioner: it has no config.json; choose another"):
        captioners.load(base)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="is a 'bert', not BLIP, Florence-2 or a timm tagger; choose another"):
        captioners.load(str(tmp_path))


def test_a_tagger_without_timm_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    (tmp_path / "config.json").write_text('{"architecture": "convnext_atto", "num_classes": 6}')
    with pytest.raises(ValueError, match="needs the package timm, which is not here; run: pip install timm"):
        captioners.load(str(tmp_path))


def test_a_module_of_ones_own_is_a_captioner(monkeypatch):
    monkeypatch.setitem(sys.modules, "mine", types.SimpleNamespace(describe=lambda pictures: ["a cat"] * len(pictures)))
    assert captioners.load("mine").describe(PICTURES) == ["a cat"] * 3


def test_blips_word_that_is_none_and_a_cut_sentence():
    assert captioners.ARAFED.sub("", "araffe man with a hat") == "man with a hat"
    assert captioners.ARAFED.sub("", "arafed woman and a giraffe") == "woman and a giraffe"
    assert captioners._whole("A man. He has a") == "A man."
    assert captioners._whole("A man with a") == "A man with a" and captioners._whole(" A man. ") == "A man."


def test_a_wide_picture_is_whole_in_its_square():
    square = captioners._square(Image.new("RGB", (40, 10), "black"))
    assert square.size == (40, 40) and np.asarray(square).mean() == pytest.approx(255 * 0.75)
