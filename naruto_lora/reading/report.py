"""What was found in a data set: pictures taken, what was left out and why, where captions came from."""

from __future__ import annotations

import collections
from dataclasses import dataclass, field

from ..progress import note

NAMED = 3  # files that a line names before it counts the rest


@dataclass
class Found:
    """Filled in by a reader; `data.load(dataset, found=...)` gives it to the caller.

    `captions` counts pictures by where their caption was, `left` holds the names of what was not taken by the reason,
    `said` holds what was done that a user may not expect.
    """

    captions: collections.Counter[str] = field(default_factory=collections.Counter)
    left: dict[str, list[str]] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)
    differing: dict[tuple[str, str], list[str]] = field(default_factory=dict)  # (taken from, other place): pictures

    def leave(self, why: str, name: str) -> None:
        """Remembers that `name` was not taken; `why` completes '3 files were not taken: ...'."""
        self.left.setdefault(why, []).append(name)

    def add(self, other: Found) -> None:
        """Takes over what `other` remembers as not taken."""
        for why, names in other.left.items():
            self.left.setdefault(why, []).extend(names)

    @property
    def named(self) -> set[str]:
        """The names of all that was not taken."""
        return {name for names in self.left.values() for name in names}

    def differ(self, taken: str, other: str, name: str) -> None:
        """Remembers that the picture `name` has another caption in `other` than in `taken`, whose caption counts."""
        self.differing.setdefault((taken, other), []).append(name)

    def say(self, text: str) -> None:
        """Remembers a line, once."""
        if text not in self.said:
            self.said.append(text)

    def lines(self) -> list[str]:
        """What a user must hear: one line for each reason to leave something out, and what was said."""
        left = [f"{len(names):,} not taken, {why}: {some(names)}" for why, names in self.left.items()]
        return left + self.choices() + self.said

    def choices(self) -> list[str]:
        """A line for each two places that say different things of pictures."""
        return [f"captions differ in {taken} and {other}; those in {taken} are taken: {some(names)}"
                for (taken, other), names in self.differing.items()]  # fmt: skip

    def tell(self, show=None) -> None:
        """`lines` as notes."""
        for line in self.lines():
            note(show, line)


def rows(found: Found) -> list[dict]:
    """Rows for a table: pictures by where their caption was, what was left out and why, and what was said."""
    taken = [{"what": f"pictures with captions in {where}", "how many": f"{count:,}", "which": ""}
             for where, count in found.captions.items()]  # fmt: skip
    left = [{"what": f"not taken, {why}", "how many": f"{len(names):,}", "which": some(names)}
            for why, names in found.left.items()]  # fmt: skip
    return taken + left + [{"what": text, "how many": "", "which": ""} for text in found.choices() + found.said]


def some(names: list[str]) -> str:
    """'a.gif, b.gif, c.gif and 5 more'; names are cut to 60 letters."""
    text = ", ".join(f"{name[:57]}..." if len(name) > 60 else name for name in names[:NAMED])
    return f"{text} and {len(names) - NAMED:,} more" if len(names) > NAMED else text
