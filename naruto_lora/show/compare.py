"""Side by side: base and adapters on the same prompts and seeds, as one picture, a slider or cards."""

from __future__ import annotations

import base64
import html
import io
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from .. import data, files
from ..measure.similarity import Copying
from .report import readable

INK, PAPER, MARGIN = "#1b1b1f", "#ffffff", 12


def grid(rows: dict[str, list[Image.Image]], captions: list[str] | None = None, size: int = 256) -> Image.Image:
    """One picture: a labelled row for each model, a column for each prompt, captions below; cells of `size` px.

    Small pictures are enlarged without smoothing, so that the model's own pixels are seen.
    """
    count = max(len(pictures) for pictures in rows.values())
    font, small = ImageFont.load_default(size // 11 + 4), ImageFont.load_default(size // 18 + 5)
    left = MARGIN * 2 + max(int(font.getlength(readable(name))) for name in rows)
    width = left + count * (size + MARGIN)
    letters = max(8, int(size / small.getlength("n")))
    texts = [textwrap.fill(_cut(c, letters, 9), letters, max_lines=9) for c in captions or ()]
    line = small.getbbox("A")[3] + 4  # as Pillow spaces the lines of a text
    under = max((text.count("\n") + 1 for text in texts), default=0) * line + (small.getmetrics()[1] if texts else 0)
    sheet = Image.new("RGB", (width, MARGIN + len(rows) * (size + MARGIN) + under), PAPER)
    pen = ImageDraw.Draw(sheet)
    for r, (name, pictures) in enumerate(rows.items()):
        top = MARGIN + r * (size + MARGIN)
        pen.text((MARGIN, top + size // 2), readable(name), INK, font, anchor="lm")
        for c, picture in enumerate(pictures):
            sheet.paste(_enlarged(picture, size), (left + c * (size + MARGIN), top))
    for c, text in enumerate(texts):
        pen.text((left + c * (size + MARGIN), sheet.height - under), text, INK, small)
    return sheet


def beside(
    drawn: dict[str, list[Image.Image]], prompts: list[str], per_prompt: int = 1, size: int = 256
) -> Image.Image:
    """One picture, readable on a phone: a column for each model (base | 256 | 1024), prompts across.

    Each model has `per_prompt` pictures for each prompt, one after the other; each is a row.
    """
    pictures = zip(*drawn.values(), strict=True)
    rows = [("" if k % per_prompt else prompts[k // per_prompt], found) for k, found in enumerate(pictures)]
    return sheet(rows, list(drawn), size)


def strip(pictures: list[Image.Image], labels: list[str], caption: str = "", size: int = 256,
          columns: int = 3) -> Image.Image:
    """Labelled pictures of one prompt, `columns` in a row: weights, schedulers, checkpoints."""
    parts = [slice(k, k + columns) for k in range(0, len(pictures), columns)]
    rows = [(caption if part.start == 0 else "", pictures[part], labels[part]) for part in parts]
    return sheet(rows, [""] * min(columns, len(pictures)), size)


def nearest(found: Copying, drawn: list, examples: list[data.Example], count: int = 3) -> Image.Image:
    """The `count` generated pictures nearest to a training picture, each beside that picture."""
    pairs = found.pairs[:count]
    real = [data.crop(examples[m].image(), drawn[k].width)[0] for k, m, _ in pairs]
    rows = {"drawn": [drawn[k] for k, *_ in pairs], "nearest training picture": real}
    captions = [f"{distance:.2f} of the distance to the others" for *_, distance in pairs]
    return beside(rows, captions, size=224)


def over_time(
    previews: dict[int, list[Image.Image]], prompts: list[str], size: int = 256, columns: int = 4
) -> Image.Image:
    """A run's previews {step: pictures} as one picture: a column for each step, a row for each prompt that was drawn.

    If there are more than `columns` steps, evenly spaced ones are shown, with the first and the last.
    """
    if not previews:
        raise ValueError("there are no previews to show: train with `previews` above 0")
    steps, count = sorted(previews), min(columns, len(previews))
    steps = [steps[round(k * (len(steps) - 1) / max(1, count - 1))] for k in range(count)]
    found = max(map(len, previews.values()))
    rows = [(text, [previews[step][r] if r < len(previews[step]) else None for step in steps])
            for r, text in enumerate(prompts[:found])]
    return sheet(rows, [f"step {step}" for step in steps], size)


def sheet(rows: list[tuple], columns: list[str], size: int = 256) -> Image.Image:
    """Rows (text across, pictures or None) under labelled columns, cells of `size` px, as one picture.

    A row can have a third item: labels under its pictures. Letters are 1/34 of the width, readable when the sheet is
    as wide as a phone. The sheet has its own background, for light and dark pages.
    """
    cell = size + MARGIN
    width = MARGIN + max(2, len(columns)) * cell
    font = ImageFont.load_default(max(14, width // 34))
    line = round(font.size * 1.3)
    texts = [_filled(row[0], font, width - 2 * MARGIN) for row in rows]
    lines = [bool(text) + text.count("\n") + (len(row) > 2) for text, row in zip(texts, rows, strict=True)]
    heights = [cell + line * count for count in lines]
    head = line if any(columns) else 0
    page = Image.new("RGB", (width, MARGIN + head + sum(heights)), PAPER)
    pen, top = ImageDraw.Draw(page), MARGIN + head
    lefts = [MARGIN + c * cell for c in range(len(columns))]
    for left, label in zip(lefts, columns, strict=True):
        pen.text((left + size // 2, MARGIN - 2), _short(label, font, size), INK, font, anchor="ma")
    for text, row, height in zip(texts, rows, heights, strict=True):
        pen.text((MARGIN, top), text, INK, font, spacing=line - font.size)
        below = top + height - cell - line * (len(row) > 2)
        for left, picture in zip(lefts, row[1], strict=False):
            if picture is not None:
                page.paste(_enlarged(picture, size), (left, below))
        for left, label in zip(lefts, row[2] if len(row) > 2 else (), strict=False):
            pen.text((left + size // 2, below + size + 2), _short(label, font, size), INK, font, anchor="ma")
        top += height
    return page


def _filled(text: str, font, width: int, lines: int = 4) -> str:
    """`text` wrapped to `width` px and cut after `lines` lines."""
    text = _cut(text, int(width / font.getlength(".")), lines)
    letters = max(3, len(text))  # as many as the placeholder has
    while letters > 2:
        filled = textwrap.fill(text, letters, max_lines=lines, placeholder=" ...")
        if max(map(font.getlength, filled.split("\n"))) <= width:
            return filled
        letters = min(letters - 1, int(letters * 0.95))
    return text[:1]


def _cut(text: str, letters: int, lines: int) -> str:
    """`text` on one line, without the rest that can't be in its first `lines` lines of at most `letters` letters.

    Wrapped and cut, it gives the same lines as the whole text, which may have 10,000 words.
    """
    return readable(text)[: (letters + 1) * (lines + 1)]


def _short(label: str, font, width: int) -> str:
    """`label`, its end cut off if it is wider than `width` px."""
    label = _cut(label, int(width / font.getlength(".")), 1)
    if font.getlength(label) <= width:
        return label
    while label and font.getlength(label + "...") > width:
        label = label[:-1]
    return label + "..."


def _enlarged(picture: Image.Image, size: int) -> Image.Image:
    crisp = picture.width * 2 <= size
    return picture.resize((size, size), Image.NEAREST if crisp else Image.LANCZOS)


def jpeg(picture: Image.Image, quality: int = 88) -> bytes:
    """The picture as JPEG bytes, about a fifth of a PNG's size."""
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def save(picture: Image.Image, path: str | Path) -> None:
    """Writes the picture as JPEG; what was there before stays whole until it is. Raises OSError."""
    files.replace(Path(path), lambda temporary: temporary.write_bytes(jpeg(picture)))


def show(picture: Image.Image, quality: int = 80) -> None:
    """Displays a picture in the notebook as one JPEG (a PIL image would be stored twice)."""
    from IPython.display import Image as Shown
    from IPython.display import display

    display(Shown(data=jpeg(picture, quality), format="jpeg"))


def slider(before: Image.Image, after: Image.Image, labels: tuple[str, str] = ("base", "LoRA"), size: int = 384) -> str:
    """HTML of two pictures under a slider: drag, tap or use the arrow keys. It needs no kernel and no network."""
    first, second = (data_url(picture, size) for picture in (before, after))
    left, right = (html.escape(readable(label)) for label in labels)
    tag = "position:absolute;top:8px;max-width:45%;padding:2px 8px;border-radius:4px;background:#000b;color:#fff"
    # sets every property that matters, so that the outer page's styles for img and input have no effect
    fill = "position:absolute;left:0;top:0;width:100%;height:100%;max-width:none;margin:0;border:0;padding:0"
    return f"""<div style="{_SHRINK}">
<div style="--x:50%;position:relative;width:{size}px;max-width:100%;aspect-ratio:1;overflow:hidden;\
font:14px/1.4 system-ui,sans-serif;touch-action:pan-y">
<img src="{second}" alt="{right}" style="{fill}">
<img src="{first}" alt="{left}" style="{fill};clip-path:inset(0 calc(100% - var(--x)) 0 0)">
<span style="{tag};left:8px">{left}</span><span style="{tag};right:8px">{right}</span>
<span style="position:absolute;top:0;bottom:0;left:var(--x);width:3px;margin-left:-1.5px;background:#fff;\
box-shadow:0 0 4px #000"></span>
<span style="position:absolute;top:50%;left:var(--x);transform:translate(-50%,-50%);padding:2px 7px;\
border-radius:14px;background:#fff;color:#111;box-shadow:0 0 4px #000">&#8596;</span>
<input type="range" min="0" max="100" step="0.5" value="50" aria-label="{left} or {right}"
 oninput="this.parentNode.style.setProperty('--x',this.value+'%')"
 style="{fill};opacity:0;cursor:ew-resize"></div></div>"""


def cards(drawn: dict[str, Image.Image], size: int = 320) -> str:
    """HTML of labelled pictures side by side, as many in a row as fit; a click or Enter enlarges one."""
    figures = "".join(
        f"""<figure style="margin:0;min-width:0"><img src="{data_url(picture, size)}" alt="{name}"
 tabindex="0" title="click to enlarge" onclick="{_ZOOM}" onkeydown="if(event.key=='Enter'){{{_ZOOM}}}"
 style="display:block;width:100%;max-width:none;margin:0;cursor:zoom-in;{_crisp(picture, size)}">\
<figcaption style="padding:4px 0;text-align:center;overflow-wrap:anywhere">{name}</figcaption></figure>"""
        for name, picture in ((html.escape(readable(label)), picture) for label, picture in drawn.items())
    )
    columns = f"repeat(auto-fill,minmax(min({size}px,calc({100 / max(1, min(3, len(drawn))):.0f}% - 8px)),1fr))"
    return f"""<div style="{_SHRINK}"><div style="display:grid;gap:8px;grid-template-columns:{columns};\
max-width:{len(drawn) * (size + 8)}px;font:14px/1.4 system-ui,sans-serif">{figures}</div></div>"""


_SHRINK = "contain:inline-size;width:100%"  # never wider than its container, unlike other flex items in a widget's box
_ZOOM = "var s=this.parentNode.style;s.gridColumn=s.gridColumn?'':'1/-1'"


def _crisp(picture: Image.Image, size: int) -> str:
    return "image-rendering:pixelated" if picture.width * 2 <= size else ""


def data_url(picture: Image.Image, size: int | None = None) -> str:
    """The picture as a JPEG data URL for `img`; a small one is enlarged to `size` px without smoothing."""
    shown = _enlarged(picture, size) if size and picture.width * 2 <= size else picture
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg(shown)).decode()}"
