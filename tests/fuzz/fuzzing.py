"""How the package is fuzzed: how many inputs, what a refusal must be, odd values.

An ordinary run draws some thousand inputs, the same each time. `NARUTO_LORA_FUZZ=100000 pytest tests/fuzz` draws
100,000 new ones.
"""

import contextlib
import functools
import os
import re
import signal

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

INPUTS = int(os.environ.get("NARUTO_LORA_FUZZ", "0"))  # 0: the ordinary run
ORDINARY = 3000
PATIENCE = 60  # seconds after which an input counts as one that hangs
drawn = {}  # {test: inputs}, for the report at the end


def fuzzed(share: float):
    """Runs a test with `share` of all inputs, each for at most PATIENCE seconds. It goes below `@given`."""

    def wrap(test):
        @functools.wraps(test)
        def counted(*arguments, **values):
            drawn[test.__name__] = drawn.get(test.__name__, 0) + 1
            with patience():
                test(*arguments, **values)

        return settings(
            max_examples=max(5, round((INPUTS or ORDINARY) * share)), deadline=None, derandomize=not INPUTS,
            database=None, suppress_health_check=list(HealthCheck), print_blob=False,
            phases=[Phase.explicit, Phase.generate, Phase.shrink],
        )(counted)  # fmt: skip

    return wrap


@contextlib.contextmanager
def patience():
    def hangs(*_):
        raise AssertionError(f"this input takes more than {PATIENCE} s")

    signal.signal(signal.SIGALRM, hangs)
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)


def is_sentence(text: str, *names: str) -> None:
    """Fails unless `text` is a message for a user: one line that any file takes, with the `names`, not an address."""
    assert "\n" not in text and "\r" not in text and 10 < len(text) < 1500, text
    assert text.encode(), "no half of a letter"
    assert not re.search(r"\b0x[0-9a-f]{6,}", text), text
    for name in names:
        assert name in text, (name, text)


@contextlib.contextmanager
def refused(*names: str, kinds=(ValueError, FileNotFoundError, PermissionError)):
    """Swallows an error of just these kinds, if it is a sentence; yields a list that then holds the error."""
    caught = []
    try:
        yield caught
    except kinds as error:
        assert type(error) in kinds, repr(error)  # not a UnicodeError or JSONDecodeError, which are Python's own
        is_sentence(str(error), *names)
        caught.append(error)


HALVES = st.sampled_from(["\ud83d", "a\udce4", "\x00", "\n", "\u2028", "\x1b[31m", "\u202e", "é", "e\u0301", " ", "忍"])
TEXTS = st.one_of(st.text(max_size=12), HALVES, st.sampled_from(["x" * 300, "y/" * 600, "..", "~", "~/x", "CON"]))
NUMBERS = st.one_of(
    st.integers(-3, 20), st.integers(), st.floats(), st.floats(0, 1),
    st.sampled_from([2**63, 2**64, 10**400, -(10**400), 10**9, 0.0, -0.0, 1e-320]),
)  # fmt: skip
PLAIN = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
JSON = st.recursive(
    PLAIN, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)), max_leaves=6
)


def spoilt(content: bytes):
    """`content` with some bytes changed, cut off, left out or put in."""

    def change(parts) -> bytes:
        made = bytearray(content)
        for how, at, new in parts:
            place = at % (len(made) + 1)
            if how == "put":
                made[place:place] = new
            elif how == "cut":
                del made[place:]
            elif how == "over":
                made[place : place + len(new)] = new
            else:
                del made[place : place + len(new)]
        return bytes(made)

    part = st.tuples(st.sampled_from(["put", "over", "out", "over", "put", "cut"]), st.integers(0, 10**6),
                     st.binary(min_size=1, max_size=4))  # fmt: skip
    return st.lists(part, min_size=1, max_size=4).map(change)
