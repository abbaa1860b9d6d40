"""Folders as kohya's trainers name them: `10_style` repeats its pictures ten times, `reg/` holds other pictures."""

from __future__ import annotations

import math
import re
from pathlib import Path

from .report import Found

REPEATS = re.compile(r"([1-9]\d{0,2})_.")
MOST = 200  # a larger number is taken for a part of the name, as in '2023_summer'


def repeats(folder: Path, pictures: list[Path], found: Found) -> dict[Path, int]:
    """How often each picture is trained; without those in `reg/`, which are there to keep a subject's class.

    Numbers count only if each picture is in a folder with one. Repeats are relative: 10 and 4 become 5 and 2.
    """
    places = {file: file.relative_to(folder).parts[:-1] for file in pictures}
    own = {file: parts for file, parts in places.items() if not _is_reg(parts)}
    numbers = {file: _number(parts) for file, parts in own.items()}
    if not own or not all(numbers.values()):
        return dict.fromkeys(pictures, 1)
    for file in pictures:
        if file not in own:
            found.leave("kohya's pictures of the class (reg), which a style doesn't need",
                        file.relative_to(folder).as_posix())  # fmt: skip
    common = math.gcd(*numbers.values())
    times = {parts[_at(parts)]: numbers[file] // common for file, parts in sorted(own.items())}
    if len(set(times.values())) > 1:
        text = ", ".join(f"{name!r} {count}" for name, count in times.items())
        found.say(f"kohya's repeats are used, relative to each other: {text}; rename the folders to change that")
    else:
        text = ", ".join(f"{name!r}" for name in times)
        found.say(f"kohya's repeats are the same for all pictures ({text}), so each counts once")
    return {file: number // common for file, number in numbers.items()}


def _at(parts: tuple[str, ...]) -> int:
    """The place of the first folder with a number; -1 for none."""
    return next((n for n, part in enumerate(parts) if REPEATS.match(part)), -1)


def _number(parts: tuple[str, ...]) -> int:
    at = _at(parts)
    number = int(REPEATS.match(parts[at])[1]) if at >= 0 else 0  # type: ignore[index]  # _at has matched it
    return number if number <= MOST else 0


def _is_reg(parts: tuple[str, ...]) -> bool:
    return any(part.lower() == "reg" for part in parts)
