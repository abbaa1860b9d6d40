"""Shapes, brushes and styles for the pictures of the small world.

Everything is laid out on a board of 64 x 64 units with y pointing down, drawn some four times larger than
asked and averaged down. Chance comes from numpy's generators and pixels from Pillow's polygons only, so that
a seed gives the same picture on any machine.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

Color = tuple[int, int, int]

INK = (22, 18, 30)
WHITE = (252, 252, 252)
STYLE = "ink"


@dataclass(frozen=True)
class Look:
    """What sets a style apart.

    `outline` is in units, `line` its colour; `spikes` (0-1) is how far hair bristles; `shade` (0-1) how dark
    the shadow side is and `blur` (units) how soft its edge; `hatch` (0-1) strokes in the shadow; `rays` (0-1)
    behind the head; `grain` (levels), `wash` (0-1) and `pale` (0-1) lie over the whole picture; `vivid`
    scales saturation; `marks` are brush slashes on the wall and a jagged band of light on the hair.
    """

    outline: float = 0.0
    line: Color = INK
    spikes: float = 0.0
    shade: float = 0.0
    blur: float = 0.0
    hatch: float = 0.0
    rays: float = 0.0
    grain: float = 0.0
    wash: float = 0.0
    pale: float = 0.0
    vivid: float = 1.0
    marks: bool = False


LOOKS = {
    "soft": Look(shade=0.36, blur=1.6),
    "noisy": Look(shade=0.24, blur=1.2, grain=9.0),
    "watercolour": Look(shade=0.20, blur=0.8, wash=0.30, pale=0.18),
    "flat": Look(),
    "pencil": Look(outline=0.55, line=(104, 100, 108), shade=0.05, hatch=0.5, pale=0.12),
    "comic": Look(outline=0.75),
    "cel": Look(shade=0.36),
    "poster": Look(spikes=0.45, rays=0.3, vivid=1.1),
    STYLE: Look(outline=1.5, spikes=1.0, shade=0.5, rays=0.8, vivid=1.2, marks=True),
}
ORDINARY = tuple(name for name in LOOKS if name != STYLE)

_TURN = np.linspace(0, 2 * np.pi, 33)[:-1]
CIRCLE = np.stack([np.cos(_TURN), np.sin(_TURN)], 1)
_BUMP = np.stack([np.linspace(0, 1, 6), np.sin(np.linspace(0, np.pi, 6)).clip(0) ** 0.7])[:, :-1, None]


# Shapes: each is an (N, 2) float array of corners in units.

def _left(step):
    """The unit vectors across each step, (N, 2)."""
    return step[:, ::-1] * (-1, 1) / (np.hypot(step[:, 0], step[:, 1])[:, None] + 1e-9)


def ellipse(x, y, rx, ry=None):
    return CIRCLE * (rx, rx if ry is None else ry) + (x, y)


def arc(x, y, rx, ry, start, stop, count):
    """Points on an ellipse from `start` to `stop` degrees (0 is right, 90 is down)."""
    turn = np.radians(np.linspace(start, stop, count))
    return np.stack([x + rx * np.cos(turn), y + ry * np.sin(turn)], 1)


def mirror(points):
    return points * (-1, 1) + (64, 0)


@cache
def _swell(count: int):
    return np.sin(np.linspace(0, np.pi, count))[:, None]


def stroke(points, width, taper=0.25):
    """A brush stroke along points: `width` units in the middle, `taper` of that at the ends."""
    points = np.asarray(points, float)
    along = np.concatenate([points[1:], points[-1:]]) - np.concatenate([points[:1], points[:-1]])
    normal = _left(along)
    half = normal * (width / 2) * (taper + (1 - taper) * _swell(len(points)))
    return np.concatenate([points + half, (points - half)[::-1]])


def bend(x0, y0, x1, y1, bow, count=9):
    """A curve from one point to another that is lifted by `bow` units in the middle."""
    t = np.linspace(0, 1, count)
    return np.stack([x0 + (x1 - x0) * t, y0 + (y1 - y0) * t - 4 * bow * t * (1 - t)], 1)


def fringe(anchors, depth, spikes, rng, lean=0.0):
    """A run of bumps between anchors, on the left of the way; with `spikes` (0-1) they are pointed.

    `depth` is (bump, spike), the heights in units; at full `spikes` a tip stands about `spike` out, none just
    like its neighbour. `lean` moves the tips along the way, in shares of a step.
    """
    anchors = np.asarray(anchors, float)
    step = anchors[1:] - anchors[:-1]
    out = -_left(step)
    if spikes:
        far = depth[1] * spikes * rng.uniform(0.75, 1.25, len(step))[:, None]
        tips = anchors[:-1] + (0.5 + lean) * step + out * far
        return np.concatenate([np.stack([anchors[:-1], tips], 1).reshape(-1, 2), anchors[-1:]])
    run = anchors[:-1, None] + step[:, None] * _BUMP[0] + out[:, None] * (depth[0] * _BUMP[1])
    return np.concatenate([run.reshape(-1, 2), anchors[-1:]])


def grow(points, width):
    """Push a polygon's corners out by `width` units, pointed corners further (up to 2.2 times)."""
    step = np.concatenate([points[1:], points[:1]]) - points
    keep = np.abs(step).sum(1) > 1e-6
    points, step = points[keep], step[keep]
    turn = -1.0 if (points[:, 0] * step[:, 1] - points[:, 1] * step[:, 0]).sum() > 0 else 1.0
    normal = turn * _left(step)
    before = np.concatenate([normal[-1:], normal[:-1]])
    miter = (normal + before) / np.maximum(1 + (normal * before).sum(1), 0.35)[:, None]
    size = np.hypot(miter[:, 0], miter[:, 1])
    return points + miter * (width * np.minimum(1, 2.2 / np.maximum(size, 1e-6)))[:, None]


def mix(a, b, share) -> Color:
    """Colour a with `share` of colour b."""
    return tuple(round(p + (q - p) * share) for p, q in zip(a, b, strict=True))


class Canvas:
    """A picture being drawn, with a second layer that holds where the shadow lies."""

    def __init__(self, size: int, background: Color, look: Look):
        self.size, self.look = size, look
        self.reduce = max(2, round(256 / size))
        side = size * self.reduce
        self.unit = side / 64
        self.image = Image.new("RGB", (side, side), background)
        self.pen = ImageDraw.Draw(self.image)
        # Shadows have no detail: half the corners' resolution is enough.
        self.shadow: Any = Image.new("L", (side // 2, side // 2)) if look.shade or look.hatch else None
        self.shadow_pen: Any = None if self.shadow is None else ImageDraw.Draw(self.shadow)
        self.place()

    def place(self, tilt=0.0, scale=1.0, dx=0.0, dy=0.0):
        """Set how shapes land: turned by `tilt` radians and scaled about (32, 44), then moved by units."""
        c, s = np.cos(tilt) * scale, np.sin(tilt) * scale
        self.turn = np.array([[c, s], [-s, c]]) * self.unit
        self.move = np.array([32 + dx, 44 + dy]) * self.unit - np.array([32, 44]) @ self.turn

    def _flat(self, points, share=1.0):
        return ((points @ self.turn + self.move) * share).ravel().tolist()

    def _mask(self, points):
        mask = Image.new("L", self.shadow.size)
        ImageDraw.Draw(mask).polygon(self._flat(points, 0.5), fill=255)
        return mask

    def paint(self, points, color: Color):
        """Fill a polygon: no outline, and no shadow upon it."""
        self.pen.polygon(self._flat(points), fill=color)
        if self.shadow is not None:
            self.shadow_pen.polygon(self._flat(points, 0.5), fill=0)

    def line(self, points, width: float, color: Color):
        """Draw an even line of `width` units along points."""
        self.pen.line(self._flat(points), fill=color, width=round(width * self.unit), joint="curve")

    def part(self, points, color: Color, depth=2.6, line=1.0, dark=255):
        """Fill a polygon with the style's outline (times `line`) and a shadow at its lower right.

        The shadow is `depth` units wide (0: none) and `dark` (0-255) deep.
        """
        if self.look.outline:
            # A brush presses harder on the side away from the light.
            edge = grow(points, self.look.outline * line) + 0.14 * self.look.outline * line
            self.pen.polygon(self._flat(edge), fill=self.look.line)
        self.paint(points, color)
        if self.shadow is not None and depth:
            mask = self._mask(points)
            ImageDraw.Draw(mask).polygon(self._flat(points - (depth, 0.7 * depth), 0.5), fill=0)
            self.shadow.paste(dark, mask=mask)

    def cast(self, points, onto, dark=255):
        """Let the polygon `points` throw a shadow on the polygon `onto`."""
        if self.shadow is not None:
            self.shadow.paste(dark, mask=ImageChops.multiply(self._mask(points), self._mask(onto)))


def finish(c: Canvas, rng) -> Image.Image:
    """Average down, lay the shadow and the style's texture over the picture."""
    look, size = c.look, c.size
    image = c.image.reduce(c.reduce)
    if not (look.shade or look.hatch or look.grain or look.wash or look.pale):
        return image
    pixels = np.array(image, np.float32)
    dark = np.float32(0)
    if c.shadow is not None:
        shadow = c.shadow.resize((size, size), Image.BOX)
        if look.blur:
            shadow = shadow.filter(ImageFilter.GaussianBlur(look.blur * size / 64))
        dark = np.asarray(shadow, np.float32)[:, :, None] / 255
    if look.hatch:
        place = np.arange(size, dtype=np.float32) * (64 / size)
        across = (place[:, None] + place + np.float32(rng.uniform(0, 4))) % 4
        lines = np.clip(1.5 - np.abs(across - 2), 0, 1)[:, :, None]
        pixels *= 1 - look.hatch * lines * (0.12 + 0.6 * dark)
    pixels *= 1 - look.shade * dark * np.float32((0.9, 1.0, 0.75))
    if look.wash:
        blots = Image.fromarray(rng.integers(0, 256, (7, 7), np.uint8)).resize((size, size), Image.BICUBIC)
        pixels += look.wash * (np.asarray(blots, np.float32)[:, :, None] - 128) * 0.55
    pixels += look.pale * (250 - pixels)
    if look.grain:
        pixels += rng.normal(0, look.grain, (size, size, 1)).astype(np.float32)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
