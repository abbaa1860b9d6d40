"""The five notebooks: their form, and executed by papermill on the embedded default, then replayed by nbval."""

import ast
import builtins
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import numpy as np
import pytest

from naruto_lora import data, recipe
from naruto_lora.tiny import HIGH, LOW
from naruto_lora.tiny import run as embedded

ROOT = Path(__file__).parents[2]
BOOKS = {name: nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4) for name in embedded.NOTEBOOKS}
each = pytest.mark.parametrize("name", BOOKS)


def code(book, tag=None):
    """Sources of the code cells, or of those with `tag`."""
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    return [cell.source for cell in cells if tag is None or tag in cell.metadata.get("tags", [])]


def parameters(book) -> dict:
    (source,) = code(book, "parameters")
    return {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(source).body}


def test_there_are_the_five_with_one_head_and_one_end():
    assert sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb")) == list(embedded.NOTEBOOKS)
    heads = [[(cell.cell_type, cell.source.replace(", push_to=push_to", ""), cell.metadata) for cell in book.cells[3:8]]
             for book in BOOKS.values()]  # two of them push
    assert all(head == heads[0] for head in heads) and "colab_setup.sh" in heads[0][0][1]
    assert "preflight.refuse" in heads[0][2][1] and "storage.places" in heads[0][4][1]
    ends = [book.cells[-1].source for book in BOOKS.values()]
    assert all(end == ends[0] for end in ends) and ends[0].startswith("## If something goes wrong")
    for book in BOOKS.values():
        assert "gpu.free()\nmachine.end(disconnect)" in code(book)[-1]
        assert book.cells[-2].source.startswith("**Next:**")


def test_the_troubles_are_told_in_the_packages_own_words():
    rows = [line.split("|")[1] for line in BOOKS["01_setup"].cells[-1].source.splitlines()[3:]]
    assert len(rows) == 5
    package = "".join(path.read_text() for path in (ROOT / "naruto_lora").rglob("*.py")).replace('"\n', "")
    for said in re.findall(r"`([^`]+)`", " ".join(rows)):
        words = re.sub(r"'runs/.*?'|rank \d+, not \d+", "\0", said).split("\0")
        assert all(word in re.sub(r'\s+f?"', "", package) or word in package for word in words), said


def test_a_badge_opens_its_notebook_and_without_a_public_address_there_is_none():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    address = project.get("urls", {}).get("Repository", "").removeprefix("https://github.com/")
    page = (ROOT / "README.md").read_text()
    for name, book in BOOKS.items():
        badge = f"colab-badge.svg)](https://colab.research.google.com/github/{address}/blob/main/notebooks/{name}.ipynb)"
        (row,) = (line for line in page.splitlines() if f"[{name}](notebooks/{name}.ipynb)" in line)
        for text in (row, book.cells[0].source):
            assert badge in text if address else "colab-badge" not in text
    assert address or "githubtocolab.com" in page  # then the address bar opens it


def test_the_notebooks_links_lead_somewhere():
    for book in BOOKS.values():
        for cell in (cell for cell in book.cells if cell.cell_type == "markdown"):
            for number in re.findall(r"\*\*(0\d\w*)\*\*", cell.source):
                assert any(known.startswith(number) for known in BOOKS), number
            assert not re.search(r"\]\((?!https://colab)", cell.source), cell.source


@pytest.mark.parametrize("folder", ["", "naruto_lora", "notebooks", "tests/benchmarks"])
def test_the_pages_links_exist(folder):
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", (ROOT / folder / "README.md").read_text()):
        assert (ROOT / folder / link).exists(), link


def test_the_readme_shows_each_notebook_and_its_finished_example():
    rows = (ROOT / "README.md").read_text().splitlines()
    for name in BOOKS:
        (row,) = (row for row in rows if f"[{name}](notebooks/{name}.ipynb)" in row)
        assert f"(notebooks/executed/{name}.ipynb)" in row


@each
def test_no_name_is_used_before_a_run_from_the_top_defines_it(name):
    known = {"display", "get_ipython", "In", *dir(builtins)}
    for source in code(BOOKS[name]):
        tree = ast.parse(source)
        stored = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        stored |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        stored |= {argument.arg for node in ast.walk(tree) if isinstance(node, ast.arguments) for argument in node.args}
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                stored |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
        assert used <= known | stored, used - known - stored
        known |= stored


@each
def test_a_notebook_is_valid_and_holds_no_outputs(name):
    book = BOOKS[name]
    nbformat.validate(book)
    assert book.cells[0].cell_type == "markdown" and "free Colab T4" in book.cells[0].source
    assert book.metadata.accelerator == "GPU" and book.metadata.colab.gpuType == "T4"
    for cell in book.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
            assert len(cell.source.splitlines()) <= (24 if "# @param" in cell.source else 20), cell.source
    assert "widgets" not in book.metadata


@each
def test_parameters_are_literals_and_each_is_used(name):
    sources = code(BOOKS[name])
    values = parameters(BOOKS[name])
    assert sources[0] == code(BOOKS[name], "parameters")[0]  # first, so that papermill's go right after
    assert len(values) >= 6 and all(isinstance(value, (str, int, float, bool)) for value in values.values())
    used = {node.id for source in sources[1:] for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
    assert set(values) <= used, set(values) - used
    assert values["base"] == recipe.Recipe.base and values["dataset"] == recipe.Recipe.dataset
    assert values["vae"] == recipe.Recipe.vae and values["interactive"] is True
    if "recipe" in values:
        assert values["recipe"] in recipe.RECIPES


@each
def test_nothing_is_installed_over_colabs_own(name):
    for source in code(BOOKS[name]):
        for line in source.splitlines():
            assert not re.match(r"\s*[!%]", line), line  # no shell, no %cd, no '&'
            if "install" in line and not line.lstrip().startswith("#"):
                assert not re.search(r"torch|numpy|pillow|ipywidgets", line, re.IGNORECASE), line


@each
def test_the_plan_gives_only_parameters_that_are_there(name, tmp_path):
    plan = embedded.parameters(tmp_path, 1, 1)[name]
    assert set(plan) <= set(parameters(BOOKS[name])), "papermill only warns of unknown ones"


@pytest.fixture(scope="module")
def executed(base, tmp_path_factory) -> Path:
    """The folder of a short run of all five."""
    out = tmp_path_factory.mktemp("embedded")
    short = {}
    for file in (LOW, HIGH):
        plan = json.loads(file.read_text()) | {"legs": [{"until": 4, "lr": 2e-3}]}
        short[file] = out / file.name
        short[file].write_text(json.dumps(plan))
    plan = embedded.parameters(out, 40, 4, short[LOW], short[HIGH])
    for values in plan.values():
        values |= {"base": base} | ({"inference_steps": 2} if "inference_steps" in values else {})
    plan["05_compare"] |= {"prompt_count": 4}
    embedded.execute(ROOT, out, plan)
    return out


def outputs(out, name):
    book = nbformat.read(out / "notebooks" / f"{name}.ipynb", 4)
    return [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]


@pytest.mark.slow
@each
def test_executed_it_says_nothing_on_stderr_and_shows_pictures(executed, name):
    found = outputs(executed, name)
    assert [o.text for o in found if o.get("name") == "stderr"] == []
    assert not any(o.output_type == "error" for o in found)
    assert sum("image/jpeg" in o.get("data", {}) for o in found) >= (3 if name == "04_infer" else 1)
    book = nbformat.read(executed / "notebooks" / f"{name}.ipynb", 4)
    nbformat.validate(book)
    assert "widgets" not in book.metadata
    assert (executed / "notebooks" / f"{name}.ipynb").stat().st_size < 3e6


@pytest.mark.slow
def test_the_summary_has_every_figure(executed):
    summary = embedded.summary(executed, 1.234)
    assert summary == json.loads((executed / "summary.json").read_text())
    assert summary["minutes"] == 1.23
    models = json.loads((executed / "compare.json").read_text())["models"]
    assert [summary[k] for k in ("base", "low", "high")] == [models[k] for k in ("base", "tiny-32", "tiny-64")]
    for model in ("base", "low", "high"):
        for figure in ("attributes", "style", "holdout_loss"):
            assert {"value", "low", "high", "n"} == set(summary[model][figure])
        assert summary[model]["n"] == 4 and summary[model]["attributes"]["n"] == 4
    gains = [summary[model]["gain"]["value"] for model in ("low", "high")]
    assert all(gain != 0 for gain in gains) and "gain" not in summary["base"]
    assert (executed / "compare.jpg").stat().st_size > 10_000
    for figure in ("style_distance", "prompt_fit", "diversity", "copying"):
        assert all(figure in summary[model] for model in ("base", "low", "high"))
    assert len(list((executed / "pictures").glob("*.png"))) == 2 * 4  # four captions, base and LoRA


@pytest.mark.slow
def test_the_comparison_is_small_and_has_its_page_and_its_model_cards(executed):
    book = executed / "notebooks" / "05_compare.ipynb"
    assert book.stat().st_size < 1.5e6
    page = (executed / "compare.html").read_text()
    caption = data.split(data.load(executed / "data"), recipe.load(HIGH).holdout)[1][0].caption
    assert caption in page and page.count("data:image/jpeg") > 3 * 4 * 2 and "tiny-64 against tiny-32" in page
    for name in ("tiny-32", "tiny-64"):
        assert f"# {name}" in (executed / name / "README.md").read_text()
        assert len(list((executed / name / "images").glob("*.jpg"))) == 5


@pytest.mark.slow
def test_exported_the_comparison_keeps_its_pictures_and_its_slider(executed, tmp_path):
    nbconvert = pytest.importorskip("nbconvert", reason="nbconvert, which exports notebooks, is not installed")
    book = nbformat.read(executed / "notebooks" / "05_compare.ipynb", 4)
    text, _ = nbconvert.HTMLExporter().from_notebook_node(book)
    assert text.count("data:image/jpeg") >= 4 and 'type="range"' in text and "oninput" in text


def replay(*books):
    command = [sys.executable, "-m", "pytest", "--nbval", "--nbval-current-env", "-q", "-p", "no:cacheprovider"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([*command, *books], capture_output=True, text=True, env=environment, cwd=books[0].parent)


@pytest.mark.slow
def test_replayed_by_nbval_every_output_is_the_same(executed):
    result = replay(*(executed / "notebooks" / f"{name}.ipynb" for name in BOOKS))
    assert result.returncode == 0, result.stdout[-3000:]
    assert re.search(r"\d\d passed", result.stdout) and "failed" not in result.stdout


@pytest.mark.slow
def test_nbval_sees_one_altered_number(executed, tmp_path):
    file = shutil.copy(executed / "notebooks" / "03_train_1024.ipynb", tmp_path)
    text = Path(file).read_text()
    record = json.loads((executed / "tiny-64" / "run.json").read_text())
    value = f"{np.mean(record['holdout']['0']):.3g}"  # as the table shows the base's
    assert f"{value} [" in text
    Path(file).write_text(text.replace(f"{value} [", f"{float(value) + 0.1:.3g} ["))
    result = replay(Path(file))
    assert result.returncode == 1 and "1 failed" in result.stdout, result.stdout[-3000:]


@pytest.mark.slow
def test_a_failing_cell_is_told_with_its_error_and_its_notebook(executed, base, tmp_path):
    plan = embedded.parameters(tmp_path, 4, 1)
    plan["01_setup"] |= {"recipe": "naruto-512"}
    with pytest.raises(RuntimeError, match="ValueError: no recipe is called 'naruto-512'.*01_setup.ipynb"):
        embedded.execute(ROOT, tmp_path, plan)


@pytest.mark.slow
def test_a_parameter_that_no_notebook_has_stops_it_with_the_nearest_name(tmp_path):
    plan = embedded.parameters(tmp_path, 4, 1)
    plan["01_setup"] |= {"recipee": "naruto-256"}
    with pytest.raises(RuntimeError, match="no parameter 'recipee': did you mean 'recipe'"):
        embedded.execute(ROOT, tmp_path, plan)
