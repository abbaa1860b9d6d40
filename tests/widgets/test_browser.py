"""The widgets in a real browser: JupyterLab under headless Chromium, clicked as a person does."""

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


@pytest.fixture
def lab(tmp_path):
    """The address of a JupyterLab that serves one notebook with both widgets."""
    cells = [nbformat.v4.new_code_cell(source.strip()) for source in CELLS]
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


def run_all(page):
    page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
    page.wait_for_selector("#jp-main-statusbar:has-text('Idle')", timeout=60_000)  # it runs nothing before that
    page.locator(".lm-MenuBar-item:has-text('Run')").click()
    page.click(".lm-Menu-item:has-text('Run All Cells')")
    page.wait_for_selector("button:has-text('left (1)')", timeout=60_000)


def test_generate_stop_slide_vote_and_reload_the_votes(lab):
    from playwright.sync_api import expect, sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 1600})
        page.set_default_timeout(30_000)
        page.goto(lab)
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
        browser.close()
