"""The pictures of a data set that may spoil a LoRA, on one sheet."""

from __future__ import annotations

from PIL import Image, ImageDraw, ImageFont, ImageOps

from ..reading.faults import Fault
from .compare import INK, MARGIN, PAPER
from .report import readable


def sheet(faults: list[Fault], size: int = 128, most: int = 8) -> Image.Image:
    """A row of at most `most` thumbnails for each fault that some pictures have, under its name; names below.

    Whole pictures are shown, not their crops, in cells of `size` px.
    """
    found = [fault for fault in faults if fault.examples]
    font, small = ImageFont.load_default(16), ImageFont.load_default(11)
    width, line = MARGIN + most * (size + MARGIN), 18
    row = 26 + size + 2 * line + MARGIN
    picture = Image.new("RGB", (width, MARGIN + (len(found) * row or line + MARGIN)), PAPER)
    pen = ImageDraw.Draw(picture)
    if not found:
        pen.text((MARGIN, MARGIN), "Nothing found that may spoil a LoRA.", INK, font)
    for k, fault in enumerate(found):
        top = MARGIN + k * row
        pen.text((MARGIN, top), _cut(f"{len(fault.examples)}: {fault.what}", font, width - 2 * MARGIN), INK, font)
        for n, (example, note) in enumerate(zip(fault.examples[:most], fault.notes[:most], strict=True)):
            left = MARGIN + n * (size + MARGIN)
            picture.paste(_whole(example.image(), size), (left, top + 26))
            for place, text in enumerate((example.name, note)):
                pen.text((left, top + 28 + size + place * 14), _cut(text, small, size), INK, small)
    return picture


def _whole(image: Image.Image, size: int) -> Image.Image:
    """The whole picture in the middle of a pale square."""
    return ImageOps.pad(image, (size, size), Image.Resampling.LANCZOS, color="#e6e6ea")


def _cut(text: str, font, width: int) -> str:
    """One line of `text`, its middle left out where it is too wide: a file's number is often at its end."""
    text = readable(text)
    if font.getlength(text) <= width:
        return text
    keep = len(text)
    while keep > 2 and font.getlength(f"{text[: (keep + 1) // 2]}…{text[-(keep // 2) :]}") > width:
        keep -= 1
    return f"{text[: (keep + 1) // 2]}…{text[-(keep // 2) :]}"
