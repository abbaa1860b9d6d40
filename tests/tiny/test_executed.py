"""The executed copies for readers: small, and made from the current notebooks."""

import base64
import io
import re
from pathlib import Path

import nbformat
import pytest
from PIL import Image

from naruto_lora.tiny import executed
from naruto_lora.tiny.run import NOTEBOOKS

ROOT = Path(__file__).parents[2]
COPIES = sorted((ROOT / "notebooks" / "executed").glob("*.ipynb"))


def encoded(size, kind="PNG"):
    buffer = io.BytesIO()
    Image.effect_noise(size, 50).convert("RGB").save(buffer, kind)
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.fixture
def source():
    book = nbformat.v4.new_notebook(metadata={"widgets": {"state": {}}, "papermill": {"input_path": "/x"}})
    book.cells = [nbformat.v4.new_markdown_cell("# Title"), nbformat.v4.new_code_cell("a = 1"),
                  nbformat.v4.new_code_cell("show()")]
    return book


def ran(book, folder):
    """`book` as papermill writes it, with a picture, a slider and a widget."""
    new = nbformat.v4.new_output
    page = f'<img src="data:image/png;base64,{encoded((900, 300))}"> in {folder}'
    injected = nbformat.v4.new_code_cell(f'# Parameters\nruns = "{folder}"', metadata={"tags": ["injected-parameters"]})
    book.cells.insert(2, injected)
    book.cells[3].outputs = [
        new("display_data", {"image/png": encoded((900, 600)), "text/plain": "x"}, metadata={}),
        new("display_data", {"text/html": page}, metadata={}),
        new("display_data", {executed.WIDGET: {"model_id": "1"}, "text/plain": "Box()"}, metadata={}),
    ]
    book.cells[3].metadata["papermill"] = {"duration": 1.5}
    file = folder / "ran.ipynb"
    nbformat.write(book, file)
    return file


def sizes(text):
    found = re.findall(r'data:image/jpeg;base64,([\w+/=]+)|"image/jpeg": "([\w+/=]+)', text)
    return [Image.open(io.BytesIO(base64.b64decode(a or b))).size for a, b in found]


def test_a_copy_is_small_and_has_no_paths_of_the_machine(source, tmp_path):
    before = executed.sources(source)
    places = {str(tmp_path): "runs"}
    copy = executed.keep(ran(source, tmp_path), tmp_path / "out" / "copy.ipynb", "on a toaster", places)
    text, book = copy.read_text(), nbformat.read(copy, 4)
    assert sorted(sizes(text)) == [(512, 171), (512, 341)]
    for word in (str(tmp_path), "papermill", "widget", "image/png"):
        assert word not in text, word
    assert book.cells[1].source == "*on a toaster*" and book.cells[3].source.endswith('runs = "runs"')
    assert executed.sources(book) == before


def test_a_copy_accepts_new_text_but_no_new_code(source, tmp_path):
    copy = executed.keep(ran(source, tmp_path), tmp_path / "out" / "copy.ipynb", "on a toaster", {})
    current = nbformat.v4.new_notebook(cells=[cell.copy() for cell in executed.own(source)])
    current.cells[0].source, file = "# Better title", tmp_path / "current.ipynb"
    nbformat.write(current, file)
    before = nbformat.read(copy, 4).cells
    executed.reword(copy, file)
    after = nbformat.read(copy, 4).cells
    assert after[0].source == "# Better title" and after[1:] == before[1:] and len(after) == 5
    for changed in (current.cells[::-1], current.cells[:2], [*current.cells[:2], nbformat.v4.new_code_cell("b = 2")]):
        nbformat.write(nbformat.v4.new_notebook(cells=changed), file)
        with pytest.raises(ValueError, match="run that notebook again"):
            executed.reword(copy, file)


def test_a_full_disk_leaves_the_copy_as_it_was(source, tmp_path, monkeypatch):
    copy = executed.keep(ran(source, tmp_path), tmp_path / "copy.ipynb", "on a toaster", {})
    nbformat.write(nbformat.v4.new_notebook(cells=executed.own(nbformat.read(copy, 4))), tmp_path / "source.ipynb")
    before, whole = copy.read_bytes(), Path.write_text

    def full(path, text, **options):
        whole(path, text[:100], **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    for write in (
        lambda: executed.keep(tmp_path / "ran.ipynb", copy, "", {}),
        lambda: executed.reword(copy, tmp_path / "source.ipynb"),
    ):
        with pytest.raises(OSError, match="No space left"):
            write()
        assert copy.read_bytes() == before and not list(tmp_path.glob("*.writing"))


def test_a_failed_run_is_not_kept(source, tmp_path):
    source.cells[2].outputs = [nbformat.v4.new_output("error", ename="E", evalue="e", traceback=[])]
    nbformat.write(source, tmp_path / "failed.ipynb")
    with pytest.raises(ValueError, match="ends with an error"):
        executed.keep(tmp_path / "failed.ipynb", tmp_path / "copy.ipynb", "", {})
    assert not (tmp_path / "copy.ipynb").exists()


def test_each_notebook_has_its_copy():
    assert {path.stem for path in COPIES} >= set(NOTEBOOKS), "create them: bash colab_setup.sh run --executed"


@pytest.mark.parametrize("path", COPIES, ids=lambda path: path.stem)
def test_a_copy_matches_the_current_notebook_and_is_readable(path):
    text, book = path.read_text(), nbformat.read(path, 4)
    nbformat.validate(book)
    name = next(name for name in NOTEBOOKS if path.stem.startswith(name))
    assert executed.sources(book) == executed.sources(nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4)), (
        "update the copies: bash colab_setup.sh run --executed (at full size: tests/benchmarks/notebooks.py --keep), "
        "or if only the text is new: python -m naruto_lora.tiny.executed"
    )
    assert path.stat().st_size < 1.5e6
    assert sizes(text) and all(max(size) <= executed.SIDE for size in sizes(text))
    assert "widgets" not in book.metadata and executed.WIDGET not in text and '"output_type": "error"' not in text
    assert str(ROOT) not in text and not re.search(r'"/(home|root|tmp)/', text)
