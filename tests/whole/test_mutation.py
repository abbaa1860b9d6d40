"""Mutation testing's mutants: one change each, valid Python, and no change of words or annotations."""

import ast

import mutation
import pytest

SOURCE = '''
"""Words of 3 kinds."""
LIMIT = 7


class Box:
    @cache(5)
    def fits(self, size: Literal[4], more=2) -> bool:
        """Whether 1 < 2."""
        if size < LIMIT and not self.full:
            raise ValueError(f"{size + 1} is 1 too many")
        self.left = max(size, -more)
        return self.left in (size, None)
'''


@pytest.fixture(scope="module")
def found():
    return mutation.mutants("box.py", SOURCE)


def test_each_mutant_is_one_change(found):
    changes = {(mutant.function, " ".join(mutant.change.split())) for mutant in found}
    assert changes == {
        ("the module", "7 -> 8"),
        ("Box.fits", "2 -> 3"),
        ("Box.fits", "size < LIMIT and not self.full -> (size < LIMIT or not self.full)"),
        ("Box.fits", "size < LIMIT -> (size <= LIMIT)"),
        ("Box.fits", "not self.full -> (self.full)"),
        ("Box.fits", 'raise ValueError(f"{size + 1} is 1 too many") -> pass'),
        ("Box.fits", "self.left = max(size, -more) -> pass"),
        ("Box.fits", "max -> min"),
        ("Box.fits", "-more -> (more)"),
        ("Box.fits", "return self.left in (size, None) -> return None"),
        ("Box.fits", "self.left in (size, None) -> (self.left not in (size, None))"),
    }
    assert len(found) == len({mutant.source for mutant in found}) == len(changes)


def test_the_rest_of_a_module_stays_as_it_is(found):
    plain = ast.dump(ast.parse(SOURCE))
    for mutant in found:
        changed = [pair for pair in zip(SOURCE.splitlines(), mutant.source.splitlines(), strict=True)
                   if pair[0] != pair[1]]
        assert len(changed) == 1 and ast.dump(ast.parse(mutant.source)) != plain
        assert changed[0][0] == SOURCE.splitlines()[mutant.line - 1]


def test_letters_beyond_ascii_do_not_move_a_change():
    (mutant,) = mutation.mutants("a.py", "name = 'ß→忍', 1\n")
    assert mutant.source == "name = 'ß→忍', 2\n"
