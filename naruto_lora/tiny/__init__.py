"""The embedded default: a picture world drawn by code, a small SDXL that draws it, and two recipes to learn a style.

Nothing outside this folder knows of it: it is one more base folder, data folder and recipe file.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
BASE = FOLDER / "base"  # a folder that StableDiffusionXLPipeline.from_pretrained loads as it is
LOW, HIGH = FOLDER / "tiny-32.json", FOLDER / "tiny-64.json"  # the stand-ins of naruto-256 and naruto-1024
