"""Prompts from a list or a file."""

from __future__ import annotations

import json
from pathlib import Path


def read_prompts(source: list[str] | str | Path) -> list[str]:
    """Prompts from a list, a .txt file (one per line) or a .json file (a list of texts).

    Raises FileNotFoundError for a missing file, ValueError for one without prompts.
    """
    if isinstance(source, list):
        return source
    path = Path(source).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file '{path}' to read prompts from; check the path")
    try:
        text = path.read_text(encoding="utf-8-sig")
        prompts = json.loads(text) if path.suffix == ".json" else [line for line in text.splitlines() if line.strip()]
    except (ValueError, RecursionError):
        prompts = None
    if not prompts or not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"'{path}' holds no prompts; a .txt needs one per line, a .json a list of texts, in UTF-8")
    return prompts
