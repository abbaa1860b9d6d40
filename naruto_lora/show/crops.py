"""What a crop keeps of each picture, shown on the whole picture."""

from __future__ import annotations

from PIL import Image, ImageDraw

from ..reading import picture, shape
from . import compare

PALE = 0.7  # of white, over what is cut away


def cropped(examples: list, recipe, size: int = 256) -> Image.Image:
    """One picture: whole pictures of `examples`, pale where `recipe` crops them, with share cut away and caption."""
    cells, labels = [], []
    for example in examples:
        image = example.image()
        upright = image.height, image.width
        target = picture.bucket(upright, recipe.resolution) if recipe.buckets else (recipe.resolution,) * 2
        cells.append(kept(image, target, size))
        lost = shape.lost(upright, target)
        labels.append(f"{lost:.0%} cut away: {example.caption}" if lost >= 0.005 else example.caption)
    return compare.grid({"data": cells}, labels, size)


def kept(image: Image.Image, target: tuple[int, int], size: int) -> Image.Image:
    """The whole `image` in a square of `size` px, pale outside of what a crop to `target`, (height, width), keeps."""
    scale = size / max(image.size)
    wide, high = (max(1, round(side * scale)) for side in image.size)
    image = image.convert("RGB").resize((wide, high), Image.Resampling.LANCZOS, reducing_gap=3.0)
    inner_wide = max(1, min(wide, round(high * target[1] / target[0])))
    inner_high = max(1, min(high, round(wide * target[0] / target[1])))
    left, top = (wide - inner_wide) // 2, (high - inner_high) // 2
    box = (left, top, left + inner_wide, top + inner_high)
    pale = Image.blend(image, Image.new("RGB", image.size, compare.PAPER), PALE)
    pale.paste(image.crop(box), box[:2])
    if box != (0, 0, wide, high):
        ImageDraw.Draw(pale).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), outline=compare.INK)
    sheet = Image.new("RGB", (size, size), compare.PAPER)
    sheet.paste(pale, ((size - wide) // 2, (size - high) // 2))
    return sheet
