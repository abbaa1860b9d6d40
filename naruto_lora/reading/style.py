"""Words in a caption that say how a picture is drawn, not what it shows; a style LoRA learns best without them."""

from __future__ import annotations

import re

KINDS = (
    "anime", "manga", "cartoon", "comic", "comic book", "cel shaded", "animated", "illustrated", "chibi", "stylized",
    "hand drawn", "hand - drawn", "hand-drawn", "line", "2d", "cgi", "pixel art", "line art", "lineart", "ink", "oil",
    "watercolor", "watercolour", "pencil", "charcoal", "crayon", "digital", "vector", "fan", "concept", "detailed",
    "black and white", "colorful", "colourful", "simple", "beautiful", "close up",
)  # fmt: skip
MEDIA = ("drawing", "illustration", "painting", "sketch", "cartoon", "anime", "manga", "comic", "artwork", "art",
         "rendering", "render", "line drawing", "doodle", "caricature", "watercolor", "watercolour", "engraving",
         "woodcut", "cel", "screenshot", "screencap", "still")  # fmt: skip
ALWAYS = ("anime", "manga", "cartoon", "animated", "illustrated", "chibi", "cel shaded", "cel - shaded", "cel-shaded",
          "stylized", "hand drawn", "hand - drawn", "hand-drawn")  # fmt: skip
TAGS = frozenset((
    "anime", "manga", "cartoon", "comic", "monochrome", "greyscale", "grayscale", "sketch", "lineart", "line art",
    "anime coloring", "anime screencap", "anime screenshot", "official art", "fanart", "fan art", "concept art",
    "digital art", "traditional media", "watercolor (medium)", "watercolor", "painting (medium)", "painting",
    "acrylic paint (medium)", "oil painting (medium)", "colored pencil (medium)", "graphite (medium)",
    "ink (medium)", "pixel art", "cel shading", "flat color", "limited palette", "spot color", "muted color",
    "retro artstyle", "toon (style)", "western comics (style)", "illustration", "drawing", "game cg", "3d", "realistic",
    "photorealistic", "photo (medium)", "1990s (style)", "1980s (style)", "2000s (style)", "4koma", "partially colored",
))  # fmt: skip  (Danbooru's names, as WD taggers give them)
FROM = "anime|manga|cartoon|comic|comic book"


def _any(words) -> str:
    return "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))


_OF = rf"(?:(?:{_any(KINDS)}),? )*(?:{_any(MEDIA)})(?: style)?"  # 'black and white ink drawing'
_SHOWS = r"(?:of|showing|depicting) (?=\S)"
PATTERNS = [re.compile(pattern, re.IGNORECASE) for pattern in (
    rf"\b(?:this|the) (?:image|picture) (?:is|shows|depicts) (?:an?|the) {_OF}s? {_SHOWS}",
    rf"\b(?:an?|the|some|this) {_OF}s? {_SHOWS}",  # 'a drawing of a man' -> 'a man'
    rf"^{_OF}s? {_SHOWS}",  # 'illustration of a man' -> 'a man'
    rf",? ?\b(?:done |drawn |made |rendered )?in (?:an? |the )?(?:{_any({*KINDS, *MEDIA})})[ -]style\b",
    r",? ?\b(?:done |drawn |made |rendered )?in the style of [^,.]+",
    rf",? ?\b(?:{_any({*KINDS, *MEDIA})})[ -]style\b(?= *(?:$|[,.]))",  # ', anime style'
    rf" (?:from|in|of|like|as) (?:an?|the) (?:{FROM})(?: series| show| movie| film| game| book)?\b(?= *(?:$|[,.]))",
    rf"(?:^|, ?)(?:an? |the )?{_OF}s?(?= *(?:$|[,.]))",  # ', digital art'
    rf"\b(?:{_any(ALWAYS)})(?:(?: - |[ -])styled?)?,? (?=\w)",  # 'an anime girl' -> 'a girl'
)]  # fmt: skip
VOWEL = re.compile(r"[aeio]|un(?!i)|u[^ns]|hour|honest", re.IGNORECASE)


def without_style(text: str, more: tuple[str, ...] = ()) -> tuple[str, list[str]]:
    """(the caption without phrases that name a style, the phrases taken out).

    Whole phrases go, and 'a' or 'an' is put right, so that the rest stays a sentence: 'an anime drawing of a boy in
    the style of a comic' becomes 'a boy'. A list of tags loses whole tags. `more` are further words to take out, such
    as a series' name. A caption of nothing else stays as it is.
    """
    patterns, found = list(PATTERNS), []
    if more:
        patterns.insert(0, re.compile(rf"\b(?:{_any(more)})\b ?", re.IGNORECASE))
    parts = [part.strip() for part in text.split(",")]
    tags = [part for part in parts if part.lower() in TAGS]
    if len(parts) > 2 and tags:
        found, text = list(tags), ", ".join(part for part in parts if part not in tags)
    for pattern in patterns:
        found += [match[0].strip(" ,") for match in pattern.finditer(text)]
        text = pattern.sub(_joint, text)
    text = _mended(text)
    if not (text and found):
        return _mended(", ".join(parts)), []
    return text[0].upper() + text[1:] if parts[0][:1].isupper() else text, [words.lower() for words in found]


def _joint(match: re.Match) -> str:
    """What stays between the words around a phrase that is taken out."""
    return " " if match[0].startswith((" ", ",")) and not match[0].endswith(" ") else ""


def _mended(text: str) -> str:
    """Blanks, commas and articles put right."""
    text = re.sub(r"\s+", " ", text).strip(" ,")
    text = re.sub(r" ([,.])", r"\1", re.sub(r"(?:, ?)+,", ",", text))
    text = re.sub(r"\b(an?) (?:an?|the) ", r"\1 ", text)

    def article(match: re.Match) -> str:
        right = "an" if VOWEL.match(match[2]) else "a"
        return f"{right if match[1][0].islower() else right.capitalize()} {match[2]}"

    return re.sub(r"\b([Aa]n?) (?=(\w+))\w+", article, text)
