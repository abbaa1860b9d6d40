"""Copies of executed notebooks for readers on GitHub: small pictures, no widgets, no paths of the machine.

`python -m naruto_lora.tiny.executed` updates the text of the copies from the notebooks; the code must be the same.
"""

from __future__ import annotations

import base64
import io
import json
import re
import sys
from pathlib import Path

import nbformat
from PIL import Image

from ..files import replace
from ..reading.picture import loaded

SIDE, QUALITY = 512, 82  # px of a picture's longer side; JPEG
ADDED = ("injected-parameters", "executed")  # tags of cells that the source doesn't have
PICTURES = ("image/png", "image/jpeg")
WIDGET = "application/vnd.jupyter.widget-view+json"


def own(book) -> list:
    """The cells that came from the source."""
    return [cell for cell in book.cells if not set(ADDED) & set(cell.metadata.get("tags", []))]


def sources(book) -> list[tuple[str, str]]:
    """(kind, text) of each of its `own` cells."""
    return [(cell.cell_type, cell.source) for cell in own(book)]


def reword(file: Path, source: Path) -> None:
    """Updates the text of the copy `file` from the notebook `source`; the outputs depend only on the code.

    Raises ValueError if the code or the order of the cells differs.
    """
    book, current = nbformat.read(file, 4), sources(nbformat.read(source, 4))
    pairs = list(zip(sources(book), current, strict=False))
    if len(own(book)) != len(current) or any(a[0] != b[0] or a[0] == "code" and a != b for a, b in pairs):
        raise ValueError(f"the code in '{file}' differs from '{source}': run that notebook again")
    for cell, (_, text) in zip(own(book), current, strict=True):
        cell.source = text
    text = nbformat.writes(book, 4) + "\n"
    replace(file, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def keep(file: Path, target: Path, note: str, places: dict[str, str]) -> Path:
    """Writes the executed notebook `file` to `target` for readers; `note` says where it ran.

    `places` are {text: its replacement}, such as folders of this machine. Raises ValueError if the notebook failed.
    """
    book = nbformat.read(file, 4)
    for cell in book.cells:
        for name in ("papermill", "execution"):
            cell.metadata.pop(name, None)
        if cell.cell_type == "code":
            if any(output.output_type == "error" for output in cell.outputs):
                raise ValueError(f"'{file}' ends with an error: only a successful run is kept")
            cell.outputs = [output for output in map(_smaller, cell.outputs) if output]
    for name in ("widgets", "papermill"):
        book.metadata.pop(name, None)
    about = nbformat.v4.new_markdown_cell(f"*{note}*", id="executed")
    about.metadata["tags"] = ["executed"]
    book.cells.insert(1, about)
    text = nbformat.writes(book, 4)
    for place, name in places.items():
        text = text.replace(json.dumps(place)[1:-1], name)
    nbformat.validate(nbformat.reads(text, 4))
    target.parent.mkdir(parents=True, exist_ok=True)
    replace(target, lambda temporary: temporary.write_text(text + "\n", encoding="utf-8"))
    return target


def _smaller(output):
    """The output with pictures of at most `SIDE` px, as JPEG; None for a live widget."""
    data = output.get("data", {})
    if WIDGET in data:
        return None
    for kind in PICTURES:
        if kind in data:
            small = _jpeg(base64.b64decode(data.pop(kind)))
            data["image/jpeg"] = base64.b64encode(small).decode()
            output.metadata = {}
    if "text/html" in data:
        pattern = r"data:image/(?:png|jpeg);base64,([\w+/=]+)"
        data["text/html"] = re.sub(pattern, lambda found: _address(found[1]), data["text/html"])
    return output


def _address(encoded: str) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(_jpeg(base64.b64decode(encoded))).decode()


def _jpeg(content: bytes) -> bytes:
    image = loaded(io.BytesIO(content)).convert("RGB")
    image.thumbnail((SIDE, SIDE), Image.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY, optimize=True)
    return buffer.getvalue()


def main() -> None:
    notebooks = Path(__file__).parents[2] / "notebooks"
    stale = []
    for file in sorted((notebooks / "executed").glob("*.ipynb")):
        try:
            reword(file, notebooks / f"{file.stem.removesuffix('.full-size')}.ipynb")
        except ValueError as error:
            stale.append(str(error))
    sys.exit("\n".join(stale) or 0)


if __name__ == "__main__":
    main()
