"""The number of steps that a set of pictures asks for."""

import pytest

from naruto_lora.reading import amount


def test_a_recipes_own_pictures_ask_for_its_own_steps():
    assert amount.steps_for(amount.OWN, 765) == 765 and amount.steps_for(320, 612, own_pictures=320) == 612


@pytest.mark.parametrize("pictures, steps, times", [(30, 122, 32), (80, 199, 20), (500, 497, 8), (4736, 1530, 2.6)])
def test_steps_go_with_the_square_root_of_the_pictures(pictures, steps, times):
    assert amount.steps_for(pictures, 765) == steps
    assert steps * 8 / pictures == pytest.approx(times, rel=0.06)


def test_there_is_a_least():
    assert amount.steps_for(1, 200) == amount.LEAST


def test_legs_keep_their_proportions_and_their_order():
    assert amount.until([300, 600, 765], 765) == [300, 600, 765]
    assert amount.until([300, 600, 765], 122) == [48, 96, 122]
    assert amount.until([300, 600, 765], 3) == [1, 2, 3] and amount.until([1, 2, 100], 20) == [1, 2, 20]
    assert amount.until([200], 20) == [20]


def test_the_sentence_says_how_often_each_is_seen():
    assert amount.sentence(30, 122, 8, 765) == ("122 steps for 30 pictures, each seen 30 times (the recipe's 765 are "
                                                "for 1,184); to choose yourself, set `steps`")  # fmt: skip
    assert "each seen 32 times" in amount.sentence(30, 32, 96, 200)
