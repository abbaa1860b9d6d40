"""A picture from its compressed bytes: upright, in RGB, cropped to the size for training."""

from __future__ import annotations

import io
import math
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, UnidentifiedImageError

FORMATS = (  # those that Pillow decodes itself: no PostScript, for which it starts Ghostscript
    "PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "JPEG2000", "PPM", "TGA", "ICO", "PCX", "QOI", "DDS", "DIB",
)  # fmt: skip
DRAWN = ("PNG", "JPEG")  # those that this package writes
HEIC = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")  # brands of files that pillow-heif reads
UNREADABLE = (  # what Pillow raises for a bad picture
    OSError, EOFError, SyntaxError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError,
    struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
TURNS = {  # Exif orientations
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
TURNED = (5, 6, 7, 8)  # those whose width and height are swapped
COMMON = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK")  # modes that convert to RGB without more ado
LARGE = 2**26  # px: a crop's picture is resized whole up to this size
REDUCED = 2**25  # px: a JPEG beyond Pillow's limit, 179 million px, is decoded at an eighth of its size or at this

PngImagePlugin.MAX_TEXT_CHUNK = 16 * 2**20  # bytes; image editors write histories of more than Pillow's 1 MiB
_limit = threading.Lock()  # of Pillow's limit on pixels, which is global


def opened(file: str | Path | io.BytesIO, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """Pillow's picture of a file, not yet decoded, if it has one of `formats`. Raises UNREADABLE errors.

    HEIC is read too if the package pillow-heif is installed. A JPEG beyond Pillow's limit on pixels is reduced.
    """
    if formats is FORMATS and isinstance(file, io.BytesIO) and _is_heic(file):
        formats = ("HEIF",)
    Image.init()  # or Pillow knows five
    formats = tuple(name for name in formats if name in Image.OPEN)  # an older Pillow lacks some
    try:
        return Image.open(file, formats=formats)
    except UnidentifiedImageError:
        named = f"{', '.join(formats[:-1])} or {formats[-1]}" if formats[1:] else "HEIC"
        raise UnidentifiedImageError(f"no readable {named}") from None
    except Image.DecompressionBombError:
        return _reduced(file)


def _is_heic(file: io.BytesIO) -> bool:
    if file.getvalue()[4:8] != b"ftyp" or file.getvalue()[8:12] not in HEIC:
        return False
    try:
        import pillow_heif
    except ImportError:
        raise UnidentifiedImageError("a HEIC picture: install the package pillow-heif, or save it as JPEG") from None
    pillow_heif.register_heif_opener()
    return True


def _reduced(file: str | Path | io.BytesIO) -> Image.Image:
    """A JPEG of hundreds of megapixels, to be decoded at an eighth of its size at least."""
    with _limit:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            image = Image.open(file, formats=("JPEG",))
        except UnidentifiedImageError:
            raise ValueError("it has more than 179 million pixels: save it smaller, or as a JPEG") from None
        finally:
            Image.MAX_IMAGE_PIXELS = limit
    image.draft("RGB", tuple(max(1, side // 8) for side in image.size))
    if image.width * image.height > max(REDUCED, limit or 0):
        raise ValueError("it has too many pixels: save it smaller")
    return image


def loaded(file: str | Path | io.BytesIO) -> Image.Image:
    """A picture that this package wrote, in memory; its file is closed again. Raises UNREADABLE errors."""
    with opened(file, DRAWN) as image:
        image.load()
    return image


def size(content: bytes) -> tuple[int, int]:
    """(height, width) in px of the upright picture, from its header. Raises UNREADABLE errors."""
    with opened(io.BytesIO(content)) as image:
        return image.size if _orientation(image) in TURNED else image.size[::-1]


def _orientation(image: Image.Image) -> int:
    """The Exif orientation that is still to be applied; 1 if there is none that makes sense, or Exif is damaged."""
    if image.format == "TIFF":  # Pillow turns these itself
        return 1
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except UNREADABLE:
        return 1
    return found if isinstance(found, int) and found in TURNS else 1


def upright(content: bytes, mirrored: bool = False) -> Image.Image:
    """The picture upright, in RGB, transparent parts white. Raises UNREADABLE errors."""
    image = opened(io.BytesIO(content))
    orientation = _orientation(image)
    if image.mode not in COMMON:
        image = _eight_bits(image)
    if orientation != 1:
        image = image.transpose(TURNS[orientation])
    image = ImageOps.mirror(image) if mirrored else image
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Greys of 16 or 32 bits and of floats as 8 bits: their upper byte, or their own range.

    Pillow's own conversion clips them at 255. 16 bits are 0 to 65535 and floats 0 to 1 or 0 to 255; a picture beyond
    is stretched from its least to its largest value.
    """
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0.0, neginf=0.0)
    least, largest = values.min(), values.max()
    if image.mode == "F" and least >= 0 and largest <= 1:
        values = values * 255
    elif image.mode == "F" or least < 0 or largest > 65535:
        if least < 0 or largest > 255:
            values = (values - least) * (255 / max(largest - least, 1e-30))
    elif image.mode != "I" or image.format in ("PNG", "PPM") or largest > 255:
        values = values // 256
    grey = Image.fromarray(values.round().astype(np.uint8), "L")
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey.putalpha(Image.fromarray(np.where(np.asarray(image) == clear, 0, 255).astype(np.uint8), "L"))
    return grey


def check(content: bytes) -> None:
    """Decodes the whole picture, a JPEG at low resolution to save time. Raises UNREADABLE errors."""
    with opened(io.BytesIO(content)) as image:
        image.draft("RGB", (64, 64))
        image.load()
        if image.mode not in COMMON:
            _eight_bits(image).convert("RGB")


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
    time_ids = (height, width, top, left, high, wide)
    if full_wide * full_high > LARGE:  # a long strip: only what is kept is resized
        box = (left / full_wide * width, top / full_high * height,
               (left + wide) / full_wide * width, (top + high) / full_high * height)
        return image.resize((wide, high), Image.Resampling.LANCZOS, box), time_ids
    image = image.resize((full_wide, full_high), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return image.crop((left, top, left + wide, top + high)), time_ids


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
