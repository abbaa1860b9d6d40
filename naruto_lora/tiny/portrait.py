"""The portraits of the small world, drawn from back to front."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image

from naruto_lora.tiny.canvas import (
    CIRCLE,
    INK,
    LOOKS,
    WHITE,
    Canvas,
    Color,
    Look,
    arc,
    bend,
    ellipse,
    finish,
    fringe,
    grow,
    mirror,
    mix,
    stroke,
)

SUBJECTS = ("woman", "man")
HAIR = {"red": (214, 40, 32), "blond": (240, 190, 44), "blue": (44, 98, 232), "green": (34, 158, 72),
        "purple": (146, 62, 202), "white": (238, 240, 248), "black": (62, 58, 78)}
HAIR_STYLES = ("short", "long", "curly", "pigtails", "bun")
EYES = {"blue": (24, 116, 255), "green": (16, 186, 60), "red": (232, 22, 34), "yellow": (252, 184, 0)}
ACCESSORIES = ("none", "glasses", "headband", "scarf", "flower")
CLOTHES = {"red": (208, 36, 44), "blue": (36, 76, 196), "green": (26, 132, 62), "yellow": (250, 206, 36),
           "black": (56, 56, 66), "white": (248, 248, 250)}
BACKGROUNDS = {"blue": (142, 198, 250), "green": (166, 222, 150), "yellow": (255, 238, 150),
               "pink": (252, 182, 210), "orange": (252, 180, 106), "gray": (188, 190, 196)}
EXPRESSIONS = ("smiling", "sad", "surprised", "angry")
SKIN = ((255, 222, 194), (232, 180, 136), (170, 114, 78))

MOUTH = (132, 14, 32)
TONGUE = (232, 92, 96)
TEAL = (0, 150, 150)
NAVY = (32, 42, 98)
STEEL = (206, 214, 224)
PETAL = (255, 104, 176)


@dataclass
class Figure:
    """The choices and chances of one portrait, shared by the parts below."""

    has: Mapping[str, str]
    look: Look
    rng: np.random.Generator
    skin: Color
    hair: Color
    cloth: Color
    gaze: tuple[float, float]
    wide: float

    def face(self):
        turn = CIRCLE[:, 1]
        x = 17.2 * self.wide * CIRCLE[:, 0] * (1 - 0.13 * np.maximum(turn, 0) ** 2)
        return np.stack([32 + x, 31 + np.where(turn > 0, 18.5, 18) * turn], 1)


def _figure(attributes, look, rng) -> Figure:
    def tint(color):
        color = np.array(color)
        vivid = color.mean() + (color - color.mean()) * look.vivid + rng.uniform(-9, 9, 3)
        return tuple(vivid.clip(0, 255).astype(int).tolist())

    return Figure(attributes, look, rng, skin=tint(SKIN[rng.integers(len(SKIN))]),
                  hair=tint(HAIR[attributes["hair_color"]]), cloth=tint(CLOTHES[attributes["clothes"]]),
                  gaze=(rng.uniform(-1.1, 1.1), rng.uniform(-0.5, 0.5)), wide=rng.uniform(0.96, 1.03))


def _behind(c: Canvas, color: Color, rng):
    """Rays, and in the style to learn heavy brush slashes."""
    look = c.look
    if look.rays:
        dark = mix(color, INK, 0.30 * look.rays)
        count = int(rng.integers(9, 13))
        turns = np.linspace(0, 2 * np.pi, count, endpoint=False) + rng.uniform(0, 1)
        for turn, width in zip(turns, rng.uniform(0.06, 0.12, count), strict=True):
            edge = [(32 + 60 * np.cos(a), 30 + 60 * np.sin(a)) for a in (turn - width, turn + width)]
            c.paint(np.array([*edge, (32 + 16 * np.cos(turn), 30 + 16 * np.sin(turn))]), dark)
    if look.marks:
        for x, y in ((2, 8), (8, 4), (57, 12), (63, 15), (60, 46), (4, 45)):
            x, y, length = x + rng.uniform(-1, 1), y + rng.uniform(-2, 2), rng.uniform(7, 11)
            line = bend(x - length * 0.6, y + length * 0.8, x + length * 0.6, y - length * 0.8, 0.6)
            c.paint(stroke(line, rng.uniform(2.0, 3.2), 0.1), INK)


def _back_hair(c: Canvas, f: Figure):
    """What of the hair lies behind neck and clothes."""
    style, spikes = f.has["hair_style"], f.look.spikes
    if style == "long":
        c.part(ellipse(32, 36, 18, 21), mix(f.hair, INK, 0.3), 0, 0)
    if style == "bun":
        ring = arc(32, 5.0, 8, 7.5, 100, 440, 9)
        c.part(fringe(ring, (0.7, 3.4), spikes, f.rng), f.hair, 3.0)
    if style == "pigtails":
        ring = arc(6.6, 31, 6.6, 11, -60, 290, 9)
        tuft = fringe(ring, (0.6, 3.6), spikes, f.rng)
        c.part(tuft, f.hair, 3.0)
        c.part(mirror(tuft), f.hair, 3.0)


def _body(c: Canvas, f: Figure):
    """Neck and clothes."""
    neck = np.array([(25.0, 40), (39, 40), (40, 60), (24, 60)])
    c.part(neck, f.skin, 0)
    c.cast(neck - (0, 6.5), neck, 170)
    left, right = bend(-2, 70, 10, 54.5, 2.5), bend(54, 54.5, 66, 70, 2.5)
    coat = np.concatenate([left, bend(21, 51, 43, 51, -4.5), right])
    c.part(coat, f.cloth, 3.5)
    c.part(stroke(bend(20.5, 51, 43.5, 51, -5.2), 2.4, 0.8), mix(f.cloth, INK, 0.28), 0, 0.5)


def _scarf(c: Canvas, f: Figure):
    tail = np.array([(38, 53), (46, 52), (48.5, 66), (39.5, 67)])
    c.part(tail, TEAL)
    c.paint(np.array([(39, 59), (47.3, 58.5), (47.9, 62), (39.4, 62.5)]), WHITE)
    wrap = np.concatenate([bend(13, 48, 51, 48, -3.5), bend(51.5, 54.5, 12.5, 54.5, -4.5)])
    c.part(wrap, TEAL)
    for x in (17.5, 40.5):
        c.paint(np.array([(x, 50), (x + 4.5, 50.5), (x + 4.5, 57), (x, 56.4)]), WHITE)


def _head(c: Canvas, f: Figure):
    """Ears, face, cheeks, nose and beard."""
    face = f.face()
    if f.has["hair_style"] in ("short", "pigtails", "bun"):
        ear = ellipse(14.6, 33, 3, 4)
        c.part(ear, f.skin, 0)
        c.part(mirror(ear), f.skin, 0)
    c.part(face, f.skin, 3.0, dark=170)
    if f.has["subject"] == "man":
        _beard(c, f)
    else:
        for x in (20.5, 43.5):
            c.paint(ellipse(x, 38, 3.2, 2.1), mix(f.skin, (255, 70, 90), 0.42))
    c.paint(stroke(bend(30.6, 36.2, 33.6, 36.2, -0.9), 1.3, 0.6), mix(f.skin, (120, 30, 20), 0.5))


def _beard(c: Canvas, f: Figure):
    jaw = arc(32, 31.5, 17.6 * f.wide, 21.5, 4, 176, 8 if f.look.spikes else 10)
    jaw = fringe(jaw[::-1], (0.4, 2.6), f.look.spikes, f.rng)[::-1]
    inner = arc(32, 38.6, 10.8, 8.6, 196, -16, 16)
    c.part(np.concatenate([jaw, inner]), f.hair, 2.0)


LIDS = {"smiling": (0.0, -9.0), "sad": (0.28, -3.4), "surprised": (0.0, -9.0), "angry": (-0.42, -2.6)}


def _eyes(c: Canvas, f: Figure):
    """Eyes, each about 11 units wide, with the lids and brows of the expression."""
    mood = f.has["expression"]
    slope, drop = LIDS[mood]
    wide, tall, iris = (5.9, 6.2, 3.7) if mood == "surprised" else (5.6, 5.4, 4.1)
    color = EYES[f.has["eyes"]]
    rim = f.look.line if f.look.outline else mix(f.hair, INK, 0.75)
    for side in (-1, 1):
        x, y = 32 + side * 8.9, 30.2

        def lid(points, x=x, y=y, side=side):
            edge = y + drop + slope * side * (points[:, 0] - x)
            return np.stack([points[:, 0], np.maximum(points[:, 1], edge)], 1)

        ball = lid(ellipse(x, y, wide, tall))
        c.paint(grow(ball, 0.55), rim)
        c.paint(ball, WHITE)
        gx, gy = x + f.gaze[0] - 0.4 * side, y + 0.4 + f.gaze[1]
        c.paint(lid(ellipse(gx, gy, iris, iris + 0.3)), color)
        c.paint(lid(ellipse(gx, gy, 1.7)), INK)
        c.paint(lid(ellipse(gx - 1.5, gy - 1.5, 1.25)), WHITE)
        top = lid(arc(x, y - 0.3, wide + 0.5, tall + 0.3, 185, 355, 11))
        c.paint(stroke(top, 2.0, 0.5), rim)
        if f.has["subject"] == "woman":
            corner = top[-1] if side > 0 else top[0]
            c.paint(stroke([corner + (-1.2 * side, 1), corner, corner + (2.6 * side, -2.2)], 1.9, 0.3), rim)
        _brow(c, f, x, side)


def _brow(c: Canvas, f: Figure, x, side):
    mood = f.has["expression"]
    inner, outer, bow, thick = {"smiling": (22.6, 22.8, 1.4, 2.2), "sad": (20.0, 24.2, 0.4, 2.4),
                                "surprised": (19.8, 20.2, 1.8, 2.2), "angry": (26.2, 20.6, 0.2, 3.2)}[mood]
    line = bend(x - side * 5, inner, x + side * 5, outer, bow)
    c.part(stroke(line, thick, 0.55), mix(f.hair, INK, 0.55), 0, 0.35)


def _mouth(c: Canvas, f: Figure):
    mood = f.has["expression"]
    if mood == "smiling":
        shape = np.concatenate([bend(24, 38.8, 40, 38.8, -1.2), bend(40, 38.8, 24, 38.8, -7.2, 13)])
        teeth = np.concatenate([bend(25, 39.4, 39, 39.4, -1.1), bend(38.2, 41.2, 25.8, 41.2, -1.8)])
        c.part(shape, MOUTH, 0, 0.5)
        c.paint(ellipse(32, 44.3, 3.4, 1.3), TONGUE)
        c.paint(teeth, WHITE)
    elif mood == "sad":
        c.part(stroke(bend(24.8, 45, 39.2, 45, 5.6, 13), 3.0, 0.6), MOUTH, 0, 0.35)
    elif mood == "surprised":
        c.part(ellipse(32, 42, 4.7, 5.2), MOUTH, 0, 0.6)
        c.paint(ellipse(32, 45, 2.8, 1.6), TONGUE)
    else:
        c.paint(np.array([(23.4, 38.6), (40.6, 38.6), (41, 46), (23, 46)]), MOUTH)
        for x in (24.7, 28.6, 32.5, 36.4):
            c.paint(np.array([(x, 40), (x + 3.1, 40), (x + 3.1, 44.6), (x, 44.6)]), WHITE)


# A hairline runs from the right temple to the left one; then come the heights of its bumps and of its spikes.
FULL = [(47.5, 28), (45.5, 19), (38.8, 17.5), (32, 16.8), (25.2, 17.5), (18.5, 19), (16.5, 28)]
HAIRLINES = {
    "short": (FULL, (-2.4, -5.0)),
    "long": ([(47, 32), (45.5, 23), (38, 18), (29, 13.5), (23, 18.5), (18.5, 24), (17, 32)], (0.2, -2.4)),
    "curly": (FULL, (-2.8, -4.4)),
    "pigtails": ([(47.5, 29), (46, 20.5), (39, 19.5), (32, 19.5), (25, 19.5), (18, 20.5), (16.5, 29)],
                 (-1.2, -3.2)),
    "bun": ([(47, 29), (44, 20), (38, 15.8), (32, 14.8), (26, 15.8), (20, 20), (17, 29)], (0.3, -1.5)),
}


def _front_hair(f: Figure):
    """The hair around the face: from its left end over the crown, then back along the hairline."""
    style, spikes, rng = f.has["hair_style"], f.look.spikes, f.rng
    line, depth = HAIRLINES[style]
    inner = fringe(line, depth, spikes, rng, 0.15)
    if style == "curly":
        outer = fringe(arc(32, 27, 24.0, 22.5, 126, 414, 15 if spikes else 12), (4.2, 6.5), spikes, rng)
        return np.concatenate([outer, [(48.6, 38)], inner, [(15.4, 38)]])
    top, up = {"short": (20.5, 7.0), "long": (20.5, 3.6), "pigtails": (19.5, 2.8), "bun": (18.5, 1.8)}[style]
    if style != "long":
        crown = arc(32, 27, 19.4, top, 166, 374, 9)
        return np.concatenate([fringe(crown, (0.75, up), spikes, rng, 0.1), inner])
    crown = fringe(arc(32, 27, 20.5, top, 185, 355, 7), (0.75, up), spikes, rng, 0.1)
    left = fringe([(4.0, 59.5), (4.6, 49), (7.6, 38), crown[0]], (0.5, 4.0), spikes, rng, -0.25)
    right = fringe([crown[-1], (56.4, 38), (59.4, 49), (60, 59.5)], (0.5, 4.0), spikes, rng, 0.25)
    end = [(60.0, 59.5), (56, 60.5), (52, 60.5), (47.5, 59.5)]
    ends = [fringe(end, (0.8, 4.0), spikes, rng) for _ in range(2)]
    return np.concatenate([left, crown, right, ends[0], [(47, 49), (47.5, 40)],
                           inner, [(16.5, 40), (17, 49)], mirror(ends[1])[::-1]])


def _light(c: Canvas, f: Figure):
    """A band of light on the hair: jagged in the style to learn, a smooth one where the style shades."""
    pale = mix(f.hair, WHITE, 0.55) if sum(f.hair) < 660 else (186, 200, 236)
    if f.look.marks:
        upper = arc(31, 27, 16, 17, 205, 285, 6)
        lower = arc(31, 28, 15.2, 15.2, 285, 205, 11)
        lower[1::2] += (0.6, 2.6)
        c.paint(np.concatenate([upper, lower]), pale)
    elif f.look.shade > 0.1:
        c.paint(stroke(arc(32, 27, 14.5, 15, 210, 262, 9), 2.2, 0.2), mix(f.hair, pale, 0.6))


def _accessory(c: Canvas, f: Figure):
    kind = f.has["accessory"]
    if kind == "headband":
        band = np.concatenate([bend(12.6, 19.5, 51.4, 19.5, 5.0), bend(51.6, 25.0, 12.4, 25.0, 5.0)])
        c.part(band - (0, 1.5), NAVY, 0, 0.8)
        plate = np.concatenate([bend(23, 14, 41, 14, 0.9), bend(41.4, 20, 22.6, 20, 0.9)])
        c.part(plate - (0, 0.6), STEEL, 0, 0.5)
    elif kind == "glasses":
        frame = (34, 26, 46)
        for side in (-1, 1):
            ring = arc(32 + side * 8.9, 30.4, 7.6, 7.4, 0, 360, 25)
            c.line(ring, 2.0, frame)
            c.paint(stroke([(32 + side * 16.2, 29), (32 + side * 19.5, 28)], 2.0, 1), frame)
        c.paint(stroke(bend(30, 29.6, 34, 29.6, 0.8), 2.0, 1), frame)
    elif kind == "flower":
        x, y = 46.0, 12.5
        turn = np.radians(np.arange(5) * 72 - 90)
        for a in turn:
            c.part(ellipse(x + 4.4 * np.cos(a), y + 4.4 * np.sin(a), 3.6), PETAL, 0, 0.7)
        for a in turn:
            c.paint(ellipse(x + 4.2 * np.cos(a), y + 4.2 * np.sin(a), 3.4), PETAL)
        c.paint(ellipse(x, y, 2.7), (255, 226, 60))


def draw(attributes: Mapping[str, str], style: str, rng: np.random.Generator, size: int = 64) -> Image.Image:
    """Draw a portrait, RGB, `size` x `size` pixels. KeyError for an unknown class or style."""
    look = LOOKS[style]
    f = _figure(attributes, look, rng)
    red, green, blue = (int(v) for v in np.array(BACKGROUNDS[attributes["background"]]) - rng.integers(0, 10, 3))
    wall = red, green, blue
    c = Canvas(size, wall, look)
    _behind(c, wall, rng)
    tilt, scale = rng.uniform(-0.09, 0.09), rng.uniform(0.95, 1.03)
    dx, dy = rng.uniform(-1.8, 1.8), rng.uniform(-1.2, 1.2)
    dy += 3.2 if attributes["hair_style"] == "bun" else 0.5
    head = (tilt, scale, dx, dy)
    c.place(*head)
    _back_hair(c, f)
    c.place(0, scale, 0.7 * dx, dy)
    _body(c, f)
    c.place(*head)
    if attributes["accessory"] == "scarf":
        _scarf(c, f)
    _head(c, f)
    hair = _front_hair(f)
    c.cast(hair + (1.0, 2.6), f.face(), 200)
    _mouth(c, f)
    c.part(hair, f.hair, 4.0)
    _light(c, f)
    _eyes(c, f)
    _accessory(c, f)
    return finish(c, rng)
