"""What in a data set may spoil a LoRA: a look before hours of training."""

from __future__ import annotations

import collections
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import alike
from .picture import crop
from .style import without_style

FEW = 15  # pictures: with fewer, a LoRA learns what they show rather than their style
SIDE = 512  # px at most at which pictures are compared
PLAIN = frozenset((
    "a", "an", "the", "of", "in", "on", "at", "to", "and", "or", "with", "is", "are", "was", "that", "this", "there",
    "it", "its", "his", "her", "their", "for", "from", "by", "as", "into", "over", "under", "up", "down", "out",
    "not", "no", "one", "two", "some", "man", "woman", "person", "people", "girl", "boy", "men", "women", "front",
    "background", "close", "picture", "image", "photo", "wearing", "standing", "sitting", "looking", "holding",
    "hair", "eyes",
))  # fmt: skip  (in most sets' captions)


@dataclass
class Fault:
    """A kind of fault, the examples that have it, and what to do."""

    what: str
    mend: str
    examples: list = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # on each example

    def add(self, example, text: str = "") -> None:
        self.examples.append(example)
        self.notes.append(text)

    def names(self) -> list[str]:
        """Each example's name with its note."""
        return [f"{e.name} ({text})" if text else e.name for e, text in zip(self.examples, self.notes, strict=True)]


def look(examples: list, resolution: int, base: str = "", show=None) -> list[dict]:
    """Rows for a table: each kind of fault at `resolution` px, how many pictures have it, and an example."""
    return rows(find(examples, resolution, base, show), len(examples))


def rows(faults: list[Fault], count: int) -> list[dict]:
    """`find`'s faults as rows for a table."""
    return [
        {"what": f.what, "pictures": f"{len(f.examples)} of {count:,}", "for example": (f.names() or [""])[0]}
        for f in faults
    ]


def find(examples: list, resolution: int, base: str = "", show=None, embed: Callable | None = None) -> list[Fault]:
    """Every kind of fault with the examples that have it, also the kinds that none has.

    `base` is an SDXL (hub id or folder) whose tokens captions are counted in; without it, words. `embed(pictures) ->
    (N, D)` finds the picture unlike all others; without it, eight measures of brightness, colour and edges do.
    `show(phase, done, total)` as in `progress`. Raises ValueError for a picture that can't be read.
    """
    looks, vectors = _looks(examples, resolution, show, embed)
    odd = alike.odd(vectors, 1e-3 if embed else 1.0)
    return [*_of_sizes(examples, resolution), *_of_looks(examples, looks, odd), *_of_captions(examples, base)]


def _looks(examples: list, resolution: int, show, embed: Callable | None) -> tuple[list[alike.Look], np.ndarray]:
    looks, parts = list[alike.Look](), []

    def read(example):
        return crop(example.image(), min(resolution, SIDE))[0]

    with ThreadPoolExecutor(2) as pool:
        for start in range(0, len(examples), 32):
            pictures = list(pool.map(read, examples[start : start + 32]))
            looks += pool.map(alike.look, pictures)
            parts.append(embed(pictures) if embed else [one.measures for one in looks[start:]])
            if show:
                show("looking", len(looks), len(examples))
    return looks, np.concatenate(parts)


def _of_sizes(examples: list, resolution: int) -> list[Fault]:
    small = Fault(f"smaller than {resolution} px: blurred", "find larger ones, or train at a lower resolution")
    cut = Fault("a third or more is cropped away", "set `buckets` in the recipe, or crop them yourself")
    for example in examples:
        high, wide = example.size()
        if min(high, wide) < resolution:
            small.add(example, f"{wide} x {high} px")
        lost = 1 - min(high, wide) / max(high, wide)
        if lost > 1 / 3:
            cut.add(example, f"{100 * lost:.0f}% lost")
    return [small, cut]


def _of_looks(examples: list, looks: list[alike.Look], unlike: list[int]) -> list[Fault]:
    same = Fault("the same picture again", "keep one of them: a repeated picture is memorised first")
    near = Fault("nearly the same picture", "keep the better one of each pair")
    blurred = Fault("blurred or out of focus", "leave them out: a LoRA learns blur as style")
    odd = Fault("unlike all the others", "leave it out unless it is of the style")
    few = Fault(f"fewer than {FEW} pictures", "add some: of few, a LoRA learns what they show rather than their style")
    first: dict[bytes, Any] = {}
    for example in examples:
        if (known := first.setdefault(example.digest, example)) is not example:
            same.add(example, f"as {known.name}")
    for one, again in alike.near_pairs(looks):
        if examples[one].digest != examples[again].digest:
            near.add(examples[again], f"as {examples[one].name}")
    for example, seen in zip(examples, looks, strict=True):
        if seen.sharp < alike.BLURRED:
            blurred.add(example)
    for k in unlike:
        odd.add(examples[k])
    if len(examples) < FEW:
        for example in examples:
            few.add(example)
    return [same, near, blurred, odd, few]


def _of_captions(examples: list, base: str) -> list[Fault]:
    count, most, unit = _counter(base)
    long = Fault(f"a caption of more than {most} {unit}: its end is not read", "shorten it")
    if unit == "words":
        long = Fault("a caption of 60 words or more: its end may not be read", "shorten it")
    again = Fault("a caption that others have too", "say what differs between the pictures")
    style = Fault("a caption that names the style", "take the words out, so that the LoRA needs no word for its style")
    none = Fault("a picture without a caption", "write one, or run: python -m naruto_lora caption")
    words = Fault("a word in nearly every caption", "fine for a trigger word; else add other subjects")
    texts = [example.caption.strip() for example in examples]
    known = collections.Counter(texts)
    for example, text in zip(examples, texts, strict=True):
        if not text:
            none.add(example)
            continue
        if (size := count(text)) > most:
            long.add(example, f"{size} {unit}")
        if known[text] > 1:
            again.add(example)
        if found := without_style(text)[1]:
            style.add(example, ", ".join(f"'{phrase}'" for phrase in found))
    word, having = _common(texts)
    for example, text in zip(examples, texts, strict=True):
        if word and word in _words(text):
            words.add(example, f"'{word}', as in {having} others")
    return [long, again, style, words, none]


def _common(texts: list[str]) -> tuple[str, int]:
    """(a word of nine in ten captions and more, in how many other captions it is); '' if there is none."""
    counts = collections.Counter(word for text in texts for word in _words(text))
    word, having = counts.most_common(1)[0] if counts else ("", 0)
    return (word, having - 1) if len(texts) >= 6 and having >= 0.9 * len(texts) else ("", 0)


def _words(text: str) -> set[str]:
    return set(re.findall(r"[^\W\d_]{2,}", text.lower())) - PLAIN


def _counter(base: str) -> tuple[Callable[[str], int], int, str]:
    """(count, the most that is read, unit): tokens of the base's tokenizer without its two marks, or words."""
    if not base:
        return (lambda text: len(text.split())), 59, "words"
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(base, subfolder="tokenizer")
    most, tokenizer.model_max_length = tokenizer.model_max_length - 2, 10**6  # no warning for longer ones
    return (lambda text: len(tokenizer.tokenize(text))), most, "tokens"
