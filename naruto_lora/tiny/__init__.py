"""The embedded default: a picture world drawn by code, a small SDXL that draws it, and two recipes to learn a style.

No module outside this folder knows it: for them it is just another base folder, data folder and recipe file.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
BASE = FOLDER / "base"  # a folder that StableDiffusionXLPipeline.from_pretrained loads as it is
LOW, HIGH = FOLDER / "tiny-32.json", FOLDER / "tiny-64.json"  # in place of naruto-256 and naruto-1024
