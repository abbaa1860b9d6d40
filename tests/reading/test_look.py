"""What may spoil a set: each kind of fault is found in a picture made to have it, and in no other."""

import io

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter

from naruto_lora import data
from naruto_lora.reading import alike, faults
from naruto_lora.tiny import world


def packed(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def portraits():
    """Twenty portraits of 128 px and their captions."""
    people = [world._person(3, 0, k) for k in range(20)]
    return [(world.draw(attributes, world.STYLE, rng, 128), text) for attributes, text, rng in people]


@pytest.fixture
def examples(portraits):
    return [data.Example(f"{k}.png", text, packed(picture)) for k, (picture, text) in enumerate(portraits)]


def found(examples, resolution=128, **options):
    """{the start of each fault's name: names} of the faults that some example has."""
    return {fault.what.split(":")[0]: fault.names() for fault in faults.find(examples, resolution, **options)
            if fault.examples}  # fmt: skip


def test_a_sound_set_has_no_faults_and_every_kind_is_listed(examples):
    assert found(examples) == {}
    table = data.look(examples, 128)
    assert len(table) == 12 and {row["pictures"] for row in table} == {"0 of 20"}


def test_small_and_cropped_pictures_are_named_with_their_size(examples, portraits):
    picture = portraits[0][0]
    examples += [data.Example("small.png", "a", packed(picture.crop((0, 0, 128, 100)))),
                 data.Example("wide.png", "b", packed(picture.resize((260, 130))))]  # fmt: skip
    said = found(examples)
    assert said["smaller than 128 px"] == ["small.png (128 x 100 px)"]
    assert said["a third or more is cropped away"] == ["wide.png (50% lost)"]


def test_the_same_and_nearly_the_same_pictures_are_paired(examples, portraits):
    picture = portraits[4][0]
    changed = [("again.png", packed(picture)), ("saved.jpg", packed(picture, "JPEG", quality=85)),
               ("bright.png", packed(ImageEnhance.Brightness(picture).enhance(1.1))),
               ("large.png", packed(picture.resize((200, 200))))]  # fmt: skip
    said = found([*examples, *(data.Example(name, name, content) for name, content in changed)])
    assert said == {"the same picture again": ["again.png (as 4.png)"],
                    "nearly the same picture": [f"{name} (as 4.png)" for name, _ in changed[1:]]}


def test_a_blurred_picture_and_one_of_another_style_are_found(examples, portraits):
    blurred = data.Example("blurred.png", "x", packed(portraits[0][0].filter(ImageFilter.GaussianBlur(3))))
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (128, 128, 3), dtype=np.uint8))
    assert found([*examples, blurred])["blurred or out of focus"] == ["blurred.png"]
    assert found([*examples, data.Example("noise.png", "y", packed(noise))]) == {"unlike all the others": ["noise.png"]}


def test_the_odd_one_out_by_an_encoder(examples):
    def embed(pictures):
        return np.array([[1.0, k % 3, 0] for k, _ in enumerate(pictures)]) + 50 * (
            np.array([[p.getpixel((0, 0)) == pixel] for p in pictures]) * [[0, 0, 1]])  # fmt: skip

    pixel = examples[7].image().getpixel((0, 0))
    assert found(examples, embed=embed) == {"unlike all the others": ["7.png"]}


def test_captions_are_counted_in_tokens_of_the_base(examples, base):
    long = data.Example("long.png", "a woman " * 30, examples[0].source)
    assert "a caption of 60 words or more" in found([*examples, long])
    said = found([*examples, data.Example("long.png", "a woman " * 24, examples[0].source)], base=base)
    assert said["a caption of more than 46 tokens"] == ["long.png (48 tokens)"]
    assert "a caption of more than 46 tokens" not in found(examples, base=base)


def test_captions_that_name_the_style_repeat_or_lack(examples, portraits):
    texts = ["an anime girl", "a boat", "a boat ", ""]
    examples += [data.Example(f"c{k}.png", text, packed(portraits[k][0].rotate(90)), wordless=not text)
                 for k, text in enumerate(texts)]  # fmt: skip
    said = found(examples)
    assert said["a caption that names the style"] == ["c0.png ('anime')"]
    assert said["a caption that others have too"] == ["c1.png", "c2.png"]
    assert said["a picture without a caption"] == ["c3.png"]


def test_few_pictures_and_one_subject_are_said(examples):
    assert len(found(examples[:5])["fewer than 15 pictures"]) == 5
    same = [data.Example(e.name, f"a photo of a samurai, {k}", e.source) for k, e in enumerate(examples)]
    assert found(same)["a word in nearly every caption"][0] == "0.png ('samurai', as in 19 others)"


def test_sharpness_falls_with_blur(portraits):
    values = [alike.sharpness(portraits[0][0].filter(ImageFilter.GaussianBlur(k))) for k in range(4)]
    assert values == sorted(values, reverse=True) and values[0] > 0.25 and values[3] < alike.BLURRED
    assert alike.sharpness(Image.new("RGB", (64, 64))) == 0


def test_few_pictures_are_never_odd():
    assert alike.odd(np.eye(7)) == [] and alike.odd(np.zeros((9, 2))) == []
