"""Words of style leave a caption as whole phrases, so that the rest stays a sentence."""

import pytest

from naruto_lora.reading.style import without_style

TAKEN = [
    ("a drawing of a man with long hair", "a man with long hair"),
    ("an anime girl with long hair", "a girl with long hair"),
    ("a cartoon animal", "an animal"),
    ("a black and white drawing of an owl", "an owl"),
    ("there is a cartoon of a boy that is smiling", "there is a boy that is smiling"),
    ("a man in the style of a comic, standing", "a man, standing"),
    ("a woman with a hat in anime style", "a woman with a hat"),
    ("a character from an anime", "a character"),
    ("1girl, solo, monochrome, greyscale, long hair, official art", "1girl, solo, long hair"),
    ("a man with a sword, digital art", "a man with a sword"),
    ("an illustration of an old man", "an old man"),
    ("a pencil sketch of a dog, line art", "a dog"),
    ("anime - style image of a boy", "image of a boy"),
    ("a digital painting of a castle in an oil style", "a castle"),
    ("The image is a cartoon illustration of a young boy. He wears a band.", "A young boy. He wears a band."),
    ("a close up of a drawing of a man", "a close up of a man"),
]
KEPT = [
    "a painting on a wall", "two people standing in front of a painting", "a man with black and white hair",
    "a girl with an umbrella and a uniform", "a picture of an hourglass", "a woman drawing on paper", "anime", "",
]  # fmt: skip


@pytest.mark.parametrize("text, left", TAKEN)
def test_a_phrase_of_style_goes_and_the_grammar_stays(text, left):
    found, phrases = without_style(text)
    assert found == left and phrases and all(phrase in text.lower() for phrase in phrases)
    assert without_style(left) == (left, [])


@pytest.mark.parametrize("text", KEPT)
def test_what_a_picture_shows_stays(text):
    assert without_style(text) == (text, [])


def test_further_words_can_be_named():
    assert without_style("naruto standing on a rock", ("naruto",)) == ("standing on a rock", ["naruto"])
    assert without_style("an umbrella, Naruto style", ("naruto style",)) == ("an umbrella", ["naruto style"])
