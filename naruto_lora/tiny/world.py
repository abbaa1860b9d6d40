"""A small world of captioned portraits, drawn by code from a seed.

Eight attributes, a style and a random generator define a portrait. Captions name every attribute in varied words,
as a captioning model would, and never the style. The eight ordinary styles are for training a base model;
`STYLE` is the one that a LoRA has to learn.
"""

import io
import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from naruto_lora.files import replace
from naruto_lora.tiny import portrait
from naruto_lora.tiny.canvas import ORDINARY, STYLE
from naruto_lora.tiny.portrait import draw
from naruto_lora.tiny.soup import draw_shapes

__all__ = ["ATTRIBUTES", "ORDINARY", "STYLE", "caption", "draw", "draw_shapes", "prompts", "read_caption", "sample",
           "write_dataset"]

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "subject": portrait.SUBJECTS,
    "hair_color": tuple(portrait.HAIR),
    "hair_style": portrait.HAIR_STYLES,
    "eyes": tuple(portrait.EYES),
    "accessory": portrait.ACCESSORIES,
    "clothes": tuple(portrait.CLOTHES),
    "background": tuple(portrait.BACKGROUNDS),
    "expression": portrait.EXPRESSIONS,
}

# The words for each class. No phrase for one class also stands for another class of the same attribute.
SUBJECT = {
    "woman": ("woman", "young woman", "girl", "lady", "female character", "cute girl"),
    "man": ("man", "bearded man", "man with a beard", "guy with a beard", "young man", "male character",
            "gentleman", "bearded guy", "man with a full beard"),
}
COLOR = {"blond": ("blond", "blonde"), "gray": ("gray", "grey"), "yellow": ("yellow", "bright yellow"),
         "purple": ("purple", "purple", "violet"), "red": ("red", "red", "bright red")}
HAIR = {
    "short": ("short {} hair", "short cut {} hair", "{} short hair", "{} hair cut short"),
    "long": ("long {} hair", "long straight {} hair", "{} long hair", "{} hair down to the shoulders"),
    "curly": ("curly {} hair", "big curly {} hair", "{} curly hair", "a {} afro hairstyle",
              "{} hair in curls"),
    "pigtails": ("{} hair in pigtails", "{} hair in two pigtails", "{} pigtails", "two {} hair tails"),
    "bun": ("{} hair in a bun", "{} hair tied up in a bun", "a {} hair bun", "{} hair in a top knot"),
}
ACCESSORY = {
    "glasses": ("glasses", "round glasses", "a pair of glasses", "eyeglasses", "dark rimmed spectacles"),
    "headband": ("a headband", "a headband on the forehead", "a metal headband", "a head band"),
    "scarf": ("a scarf", "a scarf around the neck", "a striped scarf", "a warm winter scarf"),
    "flower": ("a flower in the hair", "a pink flower", "a pink flower in the hair", "a blossom in the hair"),
}
GARMENT = ("shirt", "top", "sweater", "jacket", "t - shirt", "pullover", "hoodie", "jersey")
EXPRESSION = {
    "smiling": ("smiling", "with a big smile", "looking happy", "with a happy smile", "laughing", "grinning",
                "in a cheerful mood", "with a joyful expression"),
    "sad": ("looking sad", "with a sad face", "frowning sadly", "looking unhappy", "with a sad look",
            "in a gloomy mood", "with a sorrowful expression", "looking upset and sad"),
    "surprised": ("looking surprised", "with a surprised look", "looking shocked", "with a wide open mouth",
                  "looking amazed", "with a surprised expression", "gasping in surprise"),
    "angry": ("looking angry", "with an angry face", "with gritted teeth", "looking furious", "looking mad",
              "with an angry expression", "glaring with bared teeth"),
}
BACKGROUND = ("in front of {} wall", "in front of {} background", "on {} background", "against {} background",
              "standing in front of {} wall", "with {} background", "before {} backdrop", "posing by {} wall")
LONGEST = 36  # words and marks in a caption
OPENING = ("", "", "", "a close up of ", "a portrait of ", "there is ", "a picture of ", "a photo of ")


def sample(rng: np.random.Generator) -> dict[str, str]:
    """Draw a class for each attribute, uniformly and independently."""
    return {name: classes[rng.integers(len(classes))] for name, classes in ATTRIBUTES.items()}


def _pick(rng: np.random.Generator, choices) -> str:
    return choices[rng.integers(len(choices))]


def _color(rng: np.random.Generator, color: str) -> str:
    return _pick(rng, COLOR.get(color, (color,)))


def _a(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def caption(attributes: Mapping[str, str], rng: np.random.Generator) -> str:
    """Name every attribute of a portrait in one line of at most 36 words; accessory "none" is not mentioned."""
    while True:
        text = _describe(attributes, rng)
        if len(re.findall(r"\w+|[^\w\s]", text)) <= LONGEST:
            return text


def _describe(attributes: Mapping[str, str], rng: np.random.Generator) -> str:
    hair = _pick(rng, HAIR[attributes["hair_style"]]).format(_color(rng, attributes["hair_color"]))
    eyes = f"{_color(rng, attributes['eyes'])} eyes"
    looks = _pick(rng, (f"{hair} and {eyes}", f"{eyes} and {hair}"))
    garment = _a(f"{_color(rng, attributes['clothes'])} {_pick(rng, GARMENT)}")
    wearing = f"{_pick(rng, ('wearing', 'wearing', 'dressed in'))} {garment}"
    if attributes["accessory"] != "none":
        extra = _pick(rng, ACCESSORY[attributes["accessory"]])
        wearing = "wearing " + _pick(rng, (f"{extra} and {garment}", f"{garment} and {extra}"))
    behind = _pick(rng, BACKGROUND).format(_a(_color(rng, attributes["background"])))
    mood = _pick(rng, EXPRESSION[attributes["expression"]])
    who = _pick(rng, OPENING) + _a(_pick(rng, SUBJECT[attributes["subject"]]))
    link = "and" if " with " in who else _pick(rng, ("with", "with", "who has", "having"))
    order = rng.integers(5)
    if order == 0:
        return f"{who} {link} {looks} {wearing}, {mood}, {behind}"
    if order == 1:
        return f"{who} {wearing}, with {looks}, {mood} {behind}"
    if order == 2:
        return f"{who} {mood}, {wearing}, {behind}, with {looks}"
    if order == 3:
        return f"{who} {link} {looks}, {mood}, {wearing} {behind}"
    return f"{who} {behind}, with {looks}, {wearing}, {mood}"


def read_caption(text: str) -> dict[str, str]:
    """The attributes that a caption names: the inverse of `caption`. Raises ValueError for any other text."""
    hair = [words for several in HAIR.values() for words in several]
    named = {"subject": SUBJECT, "hair_style": HAIR, "accessory": ACCESSORY, "expression": EXPRESSION}
    colored = {"hair_color": hair, "eyes": ["{} eyes"], "clothes": [f"{{}} {words}" for words in GARMENT],
               "background": ["{} wall", "{} background", "{} backdrop"]}
    patterns = {name: {k: _pattern(words) for k, words in classes.items()} for name, classes in named.items()}
    for name, words in colored.items():
        colors = {color: "|".join(COLOR.get(color, (color,))) for color in ATTRIBUTES[name]}
        patterns[name] = {color: _pattern(words, alternatives) for color, alternatives in colors.items()}
    patterns["accessory"]["none"] = ""
    found = {name: value for name in ATTRIBUTES if (value := _first(patterns[name], text)) is not None}
    if missing := [name for name in ATTRIBUTES if name not in found]:
        raise ValueError(f"'{text}' is not a caption of this world: it doesn't name {', '.join(missing)}")
    return found


def _pattern(words, color: str = r"[\w ]+?") -> str:
    """A pattern for any of `words`, with `color` in place of their {}."""
    return rf"\b(?:{'|'.join(re.escape(w) for w in words)})\b".replace(r"\{\}", f"(?:{color})")


def _first(patterns: Mapping[str, str], text: str) -> str | None:
    return next((name for name, pattern in patterns.items() if re.search(pattern, text)), None)


def _person(seed: int, use: int, index: int) -> tuple[dict[str, str], str, np.random.Generator]:
    """Attributes, caption and the generator to draw them with; a different `use` gives different people."""
    rng = np.random.default_rng([seed, use, index])
    attributes = sample(rng)
    return attributes, caption(attributes, rng), rng


def prompts(count: int, seed: int) -> list[dict]:
    """Make prompts {"text": caption, "attributes": {...}}, the same for the same seed; no data set has them."""
    people = (_person(seed, 1, index) for index in range(count))
    return [{"text": text, "attributes": attributes} for attributes, text, _ in people]


def write_dataset(folder: str | Path, count: int = 320, seed: int = 0, style: str = STYLE,
                  size: int = 128) -> Path:
    """Draw an image folder: 0000.png ... and metadata.jsonl (file_name, text), the same bytes each time.

    A complete folder stays as it is; an incomplete one, or one drawn with other arguments, is drawn again.
    metadata.jsonl is written last, so a folder that has it has all of its pictures.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    listing = folder / "metadata.jsonl"
    people = [_person(seed, 0, index) for index in range(count)]
    paths = [folder / f"{index:04d}.png" for index in range(count)]
    rows = ({"file_name": path.name, "text": text} for path, (_, text, _) in zip(paths, people, strict=True))
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    same = listing.exists() and listing.read_bytes() == lines and all(path.exists() for path in paths)
    for path, (attributes, _, rng) in zip(paths, people, strict=True):
        file = io.BytesIO()
        draw(attributes, style, rng, size).save(file, "PNG")
        # One equal picture proves that style and size are the same too.
        if same and path.read_bytes() == file.getvalue():
            return folder
        if path == paths[0]:
            listing.unlink(missing_ok=True)
            for old in folder.glob("[0-9][0-9][0-9][0-9].png"):
                old.unlink(missing_ok=True)
        same = False
        path.write_bytes(file.getvalue())
    replace(listing, lambda temporary: temporary.write_bytes(lines))
    return folder
