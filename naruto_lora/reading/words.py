"""Text files that people wrote, and whether what is in them is text."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

NO_TEXT = re.compile("[\0\ud800-\udfff]")  # NUL, and halves of a letter that JSON can hold
EMPTY = {"Cc", "Cf", "Cs", "Zs", "Zl", "Zp"}  # Unicode's kinds of letters that show nothing, as a zero-width space


def read(file: Path) -> str:
    """The text of a file. Raises ValueError if it is not in UTF-8."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:  # UTF-16 without a mark reads as letters with NULs between them
        raise ValueError(f"the file '{file}' is not in UTF-8; save it again as UTF-8")
    return text


def is_empty(text: object) -> bool:
    """Whether a caption is a text that shows nothing."""
    return isinstance(text, str) and all(unicodedata.category(letter) in EMPTY for letter in text)
