"""A picture from its compressed bytes: upright, in RGB, cropped to the size for training."""

from __future__ import annotations

import io
import math
import struct
import zlib
from pathlib import Path

from PIL import ExifTags, Image, ImageOps, PngImagePlugin, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # no PostScript, which Pillow lets Ghostscript run
DRAWN = ("PNG", "JPEG")  # those that this package writes
UNREADABLE = (  # what Pillow raises for a bad picture
    OSError, EOFError, SyntaxError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError,
    struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
TURNED = (5, 6, 7, 8)  # Exif orientations whose width and height are swapped

PngImagePlugin.MAX_TEXT_CHUNK = 16 * 2**20  # bytes; image editors write histories of more than Pillow's 1 MiB


def opened(file: str | Path | io.BytesIO, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """Pillow's picture of a file, not yet decoded, if it has one of `formats`. Raises UNREADABLE errors."""
    try:
        return Image.open(file, formats=formats)
    except UnidentifiedImageError:
        raise UnidentifiedImageError(f"no readable {', '.join(formats[:-1])} or {formats[-1]}") from None


def loaded(file: str | Path | io.BytesIO) -> Image.Image:
    """A picture that this package wrote, in memory; its file is closed again. Raises UNREADABLE errors."""
    with opened(file, DRAWN) as image:
        image.load()
    return image


def size(content: bytes) -> tuple[int, int]:
    """(height, width) in px of the upright picture, from its header. Raises UNREADABLE errors."""
    with opened(io.BytesIO(content)) as image:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) in TURNED
        return image.size if turned else image.size[::-1]


def upright(content: bytes, mirrored: bool = False) -> Image.Image:
    """The picture upright, in RGB, transparent parts white. Raises UNREADABLE errors."""
    image = ImageOps.exif_transpose(opened(io.BytesIO(content)))
    image = ImageOps.mirror(image) if mirrored else image
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def check(content: bytes) -> None:
    """Reads the whole picture, a JPEG at low resolution to save time. Raises UNREADABLE errors."""
    with opened(io.BytesIO(content)) as image:
        image.draft("RGB", (64, 64))
        image.load()
        image.getexif()


def crop(image: Image.Image, size: int | tuple[int, int]) -> tuple[Image.Image, tuple[int, ...]]:
    """The picture resized to just cover `size`, (height, width) or a square's side in px, then cropped at the centre.

    Returns the picture and SDXL's six size conditions: original height and width, crop top and left (px after
    the resize), target height and width. Source: SDXL report, arXiv 2307.01952, section 2.2.
    """
    width, height = image.size
    high, wide = (size, size) if isinstance(size, int) else size
    scale = max(wide / width, high / height)
    full_wide, full_high = max(wide, round(width * scale)), max(high, round(height * scale))
    left, top = (full_wide - wide) // 2, (full_high - high) // 2
    image = image.resize((full_wide, full_high), Image.LANCZOS, reducing_gap=3.0)
    return image.crop((left, top, left + wide, top + high)), (height, width, top, left, high, wide)


def buckets(resolution: int) -> list[tuple[int, int]]:
    """Sizes (height, width) in px of about resolution**2 px each, from 1:4 to 4:1.

    Sides are multiples of a sixteenth of `resolution` (64 px at 1024) and of 8 px, the side of one latent pixel.
    Source: multi-aspect training of the SDXL report, arXiv 2307.01952, section 2.3 and appendix I.
    """
    unit = max(8, resolution // 16 // 8 * 8)
    first, last = math.ceil(resolution / 2 / unit), round(resolution / unit)
    short = [unit * n for n in range(first, last + 1)]
    sizes = [(side, unit * round(resolution**2 / side / unit)) for side in short]
    return sorted({*sizes, *(size[::-1] for size in sizes)})


def bucket(size: tuple[int, int], resolution: int) -> tuple[int, int]:
    """The (height, width) of `buckets(resolution)` whose log aspect ratio is nearest to that of `size`."""
    height, width = size
    return min(buckets(resolution), key=lambda b: abs(math.log(b[0] / b[1] * width / height)))
