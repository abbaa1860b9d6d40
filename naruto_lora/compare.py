"""Side by side: base and adapters over the same prompts and seeds, as one picture to look at or to flip through."""

from __future__ import annotations

import base64
import io
import textwrap

from PIL import Image, ImageDraw, ImageFont

INK, PAPER, MARGIN = "#1b1b1f", "#ffffff", 12


def grid(rows: dict[str, list[Image.Image]], captions: list[str] | None = None, size: int = 256) -> Image.Image:
    """One picture with a labelled row a model and a column a prompt, cells of `size` px, captions underneath.

    Small pictures are enlarged without smoothing, so that what the model drew is what is seen.
    """
    count = max(len(pictures) for pictures in rows.values())
    font, small = ImageFont.load_default(size // 11 + 4), ImageFont.load_default(size // 18 + 5)
    left = MARGIN * 2 + max(int(font.getlength(name)) for name in rows)
    width = left + count * (size + MARGIN)
    texts = [textwrap.fill(c, max(8, int(size / small.getlength("n"))), max_lines=9) for c in captions or ()]
    under = max((text.count("\n") + 1 for text in texts), default=0) * (small.size + 4)
    sheet = Image.new("RGB", (width, MARGIN + len(rows) * (size + MARGIN) + under), PAPER)
    pen = ImageDraw.Draw(sheet)
    for r, (name, pictures) in enumerate(rows.items()):
        top = MARGIN + r * (size + MARGIN)
        pen.text((MARGIN, top + size // 2), name, INK, font, anchor="lm")
        for c, picture in enumerate(pictures):
            sheet.paste(_enlarged(picture, size), (left + c * (size + MARGIN), top))
    for c, text in enumerate(texts):
        pen.text((left + c * (size + MARGIN), sheet.height - under), text, INK, small)
    return sheet


def over_time(
    previews: dict[int, list[Image.Image]], prompts: list[str], size: int = 224, columns: int = 7
) -> Image.Image:
    """A run's previews {step: a picture a prompt} as one picture: a column a step, a row a prompt that was drawn.

    Of more than `columns` steps evenly spaced ones are taken, the first and the last always.
    """
    if not previews:
        raise ValueError("there are no previews to show: train with previews above 0 and a hold-out")
    steps, count = sorted(previews), min(columns, len(previews))
    steps = [steps[round(k * (len(steps) - 1) / max(1, count - 1))] for k in range(count)]
    font, cell = ImageFont.load_default(size // 11 + 4), size + MARGIN
    width = MARGIN + count * cell
    letters = max(8, int((width - 2 * MARGIN) / font.getlength("n")))
    rows = max(map(len, previews.values()))
    texts = [textwrap.fill(prompt, letters, max_lines=3) for prompt in prompts[:rows]]
    line, top = font.size + 6, MARGIN + font.size + 6
    sheet = Image.new("RGB", (width, top + sum(cell + line * (t.count("\n") + 1) for t in texts)), PAPER)
    pen = ImageDraw.Draw(sheet)
    for c, step in enumerate(steps):
        pen.text((MARGIN + c * cell, MARGIN), f"step {step}", INK, font)
    for r, text in enumerate(texts):
        for c, step in enumerate(steps):
            if r < len(previews[step]):
                sheet.paste(_enlarged(previews[step][r], size), (MARGIN + c * cell, top))
        pen.text((MARGIN, top + size + 2), text, INK, font)
        top += cell + line * (text.count("\n") + 1)
    return sheet


def _enlarged(picture: Image.Image, size: int) -> Image.Image:
    crisp = picture.width * 2 <= size
    return picture.resize((size, size), Image.NEAREST if crisp else Image.LANCZOS)


def jpeg(picture: Image.Image, quality: int = 88) -> bytes:
    """The picture as JPEG bytes, about a fifth of its PNG."""
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def show(picture: Image.Image) -> None:
    """Displays a picture in the notebook as one JPEG (a PIL image would be stored twice)."""
    from IPython.display import Image as Shown
    from IPython.display import display

    display(Shown(data=jpeg(picture), format="jpeg"))


def slider(before: Image.Image, after: Image.Image, labels: tuple[str, str] = ("base", "LoRA"), size: int = 384) -> str:
    """HTML of two pictures over each other with a handle to drag; works without a kernel, also in exported pages."""
    import html

    sources = [base64.b64encode(jpeg(_enlarged(p, size))).decode() for p in (before, after)]
    left, right = (html.escape(label) for label in labels)
    return f"""<div style="position:relative;width:{size}px;max-width:100%;aspect-ratio:1;font:14px sans-serif">
<img src="data:image/jpeg;base64,{sources[1]}" alt="{right}" style="position:absolute;width:100%;margin:0">
<img src="data:image/jpeg;base64,{sources[0]}" alt="{left}"
 style="position:absolute;width:100%;margin:0;clip-path:inset(0 50% 0 0)">
<span style="position:absolute;left:8px;top:8px;color:#fff;background:#000a;padding:2px 8px">{left}</span>
<span style="position:absolute;right:8px;top:8px;color:#fff;background:#000a;padding:2px 8px">{right}</span>
<input type="range" min="0" max="100" value="50" aria-label="{left} or {right}"
 style="position:absolute;left:0;bottom:8px;width:100%;margin:0"
 oninput="this.parentNode.children[1].style.clipPath='inset(0 '+(100-this.value)+'% 0 0)'"></div>"""


def browser(rows: dict[str, list[Image.Image]], captions: list[str], size: int = 320):
    """An ipywidgets box: choose a prompt and two models, drag the handle between their pictures."""
    import ipywidgets as widgets

    names = list(rows)
    wide = widgets.Layout(width="min(640px, 100%)")
    prompt = widgets.Dropdown(
        options=[(f"{k + 1}. {c}", k) for k, c in enumerate(captions)], description="prompt", layout=wide
    )
    left = widgets.Dropdown(options=names, value=names[0], description="left")
    right = widgets.Dropdown(options=names, value=names[-1], description="right")
    picture = widgets.HTML()

    def refresh(_=None):
        pair = [rows[choice.value][prompt.value] for choice in (left, right)]
        picture.value = slider(*pair, labels=(left.value, right.value), size=size)

    for choice in (prompt, left, right):
        choice.observe(refresh, "value")
    refresh()
    return widgets.VBox([prompt, widgets.HBox([left, right]), picture])
