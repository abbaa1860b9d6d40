"""Soups of random shapes: they teach an autoencoder edges and lines, and hold no portrait."""

import numpy as np
from PIL import Image

from naruto_lora.tiny.canvas import (
    INK,
    WHITE,
    Canvas,
    Color,
    Look,
    arc,
    bend,
    ellipse,
    finish,
    fringe,
    stroke,
)


def _blob(rng, x, y, r):
    """A random closed shape: ellipse, polygon, star, or bumpy or bristling blob."""
    kind, count = rng.integers(4), int(rng.integers(3, 12))
    turn = rng.uniform(0, 360)
    rx, ry = r * rng.uniform(0.4, 1, 2)
    if kind == 0:
        return ellipse(x, y, rx, ry)
    ring = arc(x, y, rx, ry, turn, turn + 360, count + 1)
    if kind == 1:
        return ring[:-1]
    return fringe(ring, (0.25 * r, 0.6 * r), float(kind == 2), rng, rng.uniform(-0.3, 0.3))


def _scribble(c: Canvas, rng, color: Color):
    """A brush stroke, a bundle of hatching or a sunburst."""
    kind = rng.integers(8)
    x, y, dx, dy = rng.uniform((0, 0, -24, -24), (64, 64, 24, 24))
    if kind < 5:
        line = bend(x, y, x + dx, y + dy, rng.uniform(-8, 8))
        c.paint(stroke(line, rng.uniform(0.8, 4), rng.uniform(0, 1)), color)
    elif kind < 7:
        gap, width = rng.uniform((1.5, 0.5), (4, 1.5))
        for k in range(int(rng.integers(3, 9))):
            c.line(np.array([(x + k * gap, y), (x + k * gap + dx / 2, y + dy / 2)]), width, color)
    else:
        width = rng.uniform(0.05, 0.15)
        for turn in np.arange(0, 2 * np.pi, rng.uniform(0.4, 0.8)):
            tips = [(x + 90 * np.cos(a), y + 90 * np.sin(a)) for a in (turn - width, turn + width)]
            c.paint(np.array([(x, y), *tips]), color)


def draw_shapes(rng: np.random.Generator, size: int = 64) -> Image.Image:
    """Draw a soup of shapes, strokes, spikes, outlines and hatching: anything but a portrait, RGB.

    An autoencoder learns edges and lines from it without seeing the style to learn.
    """
    def color():
        if rng.random() < 0.15:
            return INK if rng.random() < 0.5 else WHITE
        return tuple(rng.integers(0, 256, 3).tolist())

    outlined = rng.random() < 0.6
    look = Look(outline=float(outlined) * rng.uniform(0.5, 2.6), line=INK if rng.random() < 0.8 else color(),
                shade=float(rng.random() < 0.5) * rng.uniform(0.15, 0.5), blur=float(rng.random() < 0.3),
                hatch=float(rng.random() < 0.15) * 0.6, grain=float(rng.random() < 0.2) * 8.0,
                wash=float(rng.random() < 0.15) * 0.3)
    c = Canvas(size, color(), look)
    if rng.random() < 0.4:
        side = c.image.width
        ramp = Image.linear_gradient("L").rotate(int(rng.integers(4)) * 90).resize((side, side))
        c.image.paste(color(), mask=ramp)
    for _ in range(int(rng.integers(5, 16))):
        if rng.random() < 0.35:
            _scribble(c, rng, color())
            continue
        x, y = rng.uniform(0, 64, 2)
        r = rng.choice((2.5, 5, 9, 16, 24)) * rng.uniform(0.7, 1.3)
        c.part(_blob(rng, x, y, r), color(), r * rng.uniform(0.1, 0.4), float(rng.random() < 0.8))
    return finish(c, rng)
