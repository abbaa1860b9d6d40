"""What a form leaves open: a recipe of the project stays as it is; own pictures, and a run that was begun, decide."""

import pytest

from naruto_lora import recipe
from naruto_lora.colab import fit, storage
from naruto_lora.reading import amount

HIGH = recipe.RECIPES["naruto-1024"]


class Picture:
    def __init__(self, high, wide):
        self.high, self.wide = high, wide

    def size(self):
        return self.high, self.wide


WIDE, SQUARE = [Picture(600, 900)] * 40, [Picture(800, 800)] * 40


def test_a_recipe_with_its_own_pictures_stays_as_it_is():
    for pictures in (WIDE, SQUARE):
        fitted, said = fit.fitted(HIGH, pictures)
        assert fitted == HIGH and len(said) == 1
    fitted, _ = fit.fitted(HIGH, WIDE, crop="buckets")
    assert fitted == HIGH.replace(buckets=True)  # unless the form says otherwise


def test_own_pictures_decide_crop_and_steps():
    mine = HIGH.replace(dataset="/content/mine.zip")
    fitted, (crop, steps) = fit.fitted(mine, WIDE)
    wanted = amount.steps_for(39, 765)
    assert fitted.buckets and fitted.steps == wanted < 200 and "buckets" in crop and steps.startswith(f"{wanted} steps")
    assert [leg.lr for leg in fitted.legs] == [leg.lr for leg in HIGH.legs]
    assert not fit.fitted(mine, SQUARE)[0].buckets
    assert fit.fitted(mine, WIDE, crop="square")[0].buckets is False
    assert fit.fitted(mine, SQUARE, legs="300 1e-4")[0] == mine
    assert fit.fitted(mine, SQUARE, steps=wanted + 1)[0] == mine
    first_look, said = fit.fitted(mine, SQUARE, steps=40)
    assert first_look.steps == wanted and len(said) == 1  # of which `recipe.adjust` takes the first 40
    other = mine.replace(name="own")
    assert fit.fitted(other, SQUARE)[0] == other  # a recipe file of one's own has its own steps
    with pytest.raises(ValueError, match="`crop` is 'round'"):
        fit.fitted(mine, WIDE, crop="round")


def test_a_run_that_was_begun_keeps_its_crop_and_its_learning_rates(monkeypatch, tmp_path):
    mine = HIGH.replace(dataset="/content/mine.zip")
    wanted = amount.steps_for(39, 765)

    def fitted(buckets, step):
        state = {"step": step, "recipe": {"buckets": buckets}}
        monkeypatch.setattr(storage, "begun", lambda *places: state)
        return fit.fitted(mine, WIDE, folder=tmp_path)[0]

    assert not fitted(False, 5).buckets and fitted(True, 5).buckets
    assert fitted(False, 5).steps == wanted
    constant = fitted(False, 5).legs[0].until  # at the first leg's rate until there
    assert fitted(False, constant).steps == wanted
    assert fitted(False, constant + 1).steps == 765  # trained with the whole recipe's rates
    assert fitted(False, wanted + 1).steps == 765


def test_the_state_of_a_run_that_was_begun_is_found(plan, trained, tmp_path):
    assert storage.begun(plan, tmp_path) is None
    assert storage.begun(plan, tmp_path, trained.folder.parent)["recipe"]["name"] == plan.name
