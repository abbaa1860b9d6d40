"""The widgets in a real browser: JupyterLab under headless Chromium, clicked as a person does."""

import contextlib
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MISSING = [name for name in ("playwright", "jupyterlab") if not importlib.util.find_spec(name)]
MISSING += [] if CHROMIUM else ["chromium"]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=f"a real browser needs {', '.join(MISSING)}")]

CELLS = ['''
import time
from PIL import Image
from naruto_lora.widgets.ballot import BlindVote
from naruto_lora.widgets.comparer import PromptComparer
from naruto_lora.widgets.votes import Votes

COLOURS = {"base": "red", "style": "blue"}

def draw(pipe, prompts, seeds, weights, show, stop, steps, **settings):
    for step in range(steps):
        time.sleep(0.05)
        show("drawing", step + 1, steps)
        if stop():
            raise RuntimeError("stopped")
    return [Image.new("RGB", (64, 64), COLOURS[next(iter(weights))])]

PromptComparer("album", object(), {"base": "base", "LoRA": "style"}, ["a caption"], draw, steps=40).box
''', '''
drawn = {name: [Image.new("RGB", (64, 64), (40 * k, 0, blue)) for k in range(6)] for name, blue in
         (("base", 0), ("LoRA", 255))}
BlindVote(Votes("votes.jsonl", drawn, [f"prompt {k}" for k in range(6)], ("base", "LoRA"))).box
''']


@contextlib.contextmanager
def lab(tmp_path, sources):
    """The address of a JupyterLab that serves one notebook of code cells."""
    cells = [nbformat.v4.new_code_cell(source.strip()) for source in sources]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "try.ipynb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with open(tmp_path / "lab.log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", "--allow-root", "--no-browser", "--ip=127.0.0.1", f"--port={port}",
             "--ServerApp.token=t", "--LabApp.news_url=None", "--ServerApp.port_retries=0"],
            cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=log, stderr=log)
        try:
            wait_for(f"http://127.0.0.1:{port}/api?token=t", server)
            yield f"http://127.0.0.1:{port}/lab/tree/try.ipynb?token=t&reset"
        finally:
            server.terminate()
            server.wait(20)


def wait_for(address, server):
    import time

    for _ in range(150):
        assert server.poll() is None, "JupyterLab ended"
        try:
            return urllib.request.urlopen(address, timeout=2)
        except OSError:
            time.sleep(0.2)
    raise AssertionError("JupyterLab does not answer")


def run_all(page, until="button:has-text('left (1)')"):
    page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
    page.wait_for_selector("#jp-main-statusbar:has-text('Idle')", timeout=60_000)  # it runs nothing before that
    page.locator(".lm-MenuBar-item:has-text('Run')").click()
    page.click(".lm-Menu-item:has-text('Run All Cells')")
    page.wait_for_selector(until, timeout=60_000)


@contextlib.contextmanager
def opened(address):
    """A page of a browser at `address`."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 1600})
        page.set_default_timeout(30_000)
        page.goto(address)
        yield page
        browser.close()


def test_generate_stop_slide_vote_and_reload_the_votes(tmp_path):
    from playwright.sync_api import expect

    with lab(tmp_path, CELLS) as address, opened(address) as page:
        run_all(page)
        said, votes = page.locator("[role=status]").first, page.locator("[role=status]").last
        generate, stop = (page.locator(f"button:has-text('{text}')").first for text in ("Generate", "Stop"))

        page.locator("textarea:visible").first.fill("a prompt of my own")
        for label in ("sampler", "strength", "zoom"):
            expect(page.locator(f"label:has-text('{label}')").first).to_be_visible()
        expect(page.locator("button:has-text('next suggestion')")).to_be_visible()
        generate.click()
        expect(said).to_contain_text("drawing base (1 of 2)")
        expect(generate).to_be_disabled()
        stop.click()
        expect(said).to_contain_text("Stopped after 0 of 2")
        generate.click()
        expect(said).to_contain_text("Drawn in", timeout=30_000)
        expect(page.locator("figcaption:has-text('LoRA')").first).to_be_visible()
        expect(page.locator("text=a prompt of my own").first).to_be_visible()

        page.locator("button:has-text('slider')").click()
        handle = page.locator("input[type=range][aria-label='base or LoRA']")
        box = handle.bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 20)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] / 4, box["y"] + 20, steps=4)
        page.mouse.up()
        place = float(handle.evaluate("e => e.parentNode.style.getPropertyValue('--x')").rstrip("%"))
        assert 15 < place < 35

        page.set_viewport_size({"width": 700, "height": 1600})  # narrow: nothing may be cut off
        page.locator("button:has-text('side by side')").click()
        expect(page.locator("figure")).to_have_count(4)
        for figure in page.locator("figure").all():
            outer = figure.locator("xpath=ancestor::div[contains(@class, 'jp-OutputArea-output')][1]").bounding_box()
            inner = figure.bounding_box()
            assert inner["x"] + inner["width"] <= outer["x"] + outer["width"] + 4
        page.set_viewport_size({"width": 1280, "height": 1600})

        for k in range(3):
            page.locator(f"button:has-text('{'left (1)' if k % 2 else 'right (2)'}')").click()
            expect(votes).to_contain_text(f"{k + 1} of 6")
        page.locator("input[placeholder*='type 1']").click()
        for k, key in enumerate("12"):
            page.keyboard.press(key)
            expect(votes).to_contain_text(f"{k + 4} of 6")
        page.reload()
        run_all(page)
        expect(page.locator("[role=status]").last).to_contain_text("5 of 6", timeout=30_000)
        expect(page.locator("select:visible").filter(has_text="a prompt of my own")).to_have_count(1)


REVIEW = '''
from naruto_lora.widgets.review import Review

Review("set").box
'''


def test_captions_are_edited_undone_and_there_after_a_reload(tmp_path):
    from playwright.sync_api import expect

    from naruto_lora.tiny import world

    world.write_dataset(tmp_path / "set", count=5)
    (tmp_path / "set" / "metadata.jsonl").unlink()
    for k in range(4):
        (tmp_path / "set" / f"{k:04d}.txt").write_text(f"caption number {k} of a man")
    with lab(tmp_path, [REVIEW]) as address, opened(address) as page:
        ready = "textarea[placeholder='what the picture shows']"
        run_all(page, ready)
        caption, said = page.locator(ready), page.locator("[role=status]")
        expect(page.locator("img[alt='0000.png']")).to_be_visible()
        caption.click()
        for k in range(3):  # by keyboard alone: the caption, Tab to 'next', Enter, and back
            page.keyboard.press("Control+a")
            page.keyboard.type(f"my own {k}", delay=10)
            expect(said).to_contain_text("Saved")
            if k < 2:
                page.keyboard.press("Tab")
                page.keyboard.press("Enter")
                expect(page.locator(f"img[alt='000{k + 1}.png']")).to_be_visible()
                page.keyboard.press("Shift+Tab")
        page.locator("button:has-text('undo')").click()
        expect(caption).to_have_value("caption number 2 of a man")
        page.locator("button:has-text('next without caption')").click()
        expect(page.locator("img[alt='0004.png']")).to_be_visible()
        expect(caption).to_have_value("")
        for label, text in (("find", "own"), ("replace", "very own")):
            page.get_by_label(label, exact=True).fill(text)
        page.locator("button:has-text('replace in all')").click()
        expect(said).to_contain_text("Replaced in 2 of 5 captions")
        if os.environ.get("SCREENSHOTS"):
            page.screenshot(path=Path(os.environ["SCREENSHOTS"], "review.png"))
        page.set_viewport_size({"width": 700, "height": 1600})
        inner, outer = caption.bounding_box(), page.locator(".jp-OutputArea-output").first.bounding_box()
        assert inner["x"] + inner["width"] <= outer["x"] + outer["width"] + 4
        page.reload()
        run_all(page, ready)
        for k, text in enumerate(["my very own 0", "my very own 1", "caption number 2 of a man"]):
            expect(page.locator(f"img[alt='000{k}.png']")).to_be_visible()
            expect(caption).to_have_value(text)
            page.locator("button:has-text('next ▶')").click()
        if os.environ.get("SCREENSHOTS"):
            page.screenshot(path=Path(os.environ["SCREENSHOTS"], "review-narrow.png"))
    assert (tmp_path / "set" / "0001.txt").read_text() == "my very own 1"
