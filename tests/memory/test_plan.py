"""The memory plan on cards of many sizes, for SDXL at full size; from its configuration, without loading weights."""

import json
import math

import pytest
import torch
from benchmarks import sdxl

from naruto_lora import recipe
from naruto_lora.memory import plan, predict
from naruto_lora.memory.gpu import CONTEXT, GIB, Card
from naruto_lora.show import report

SIZES = (6, 8, 10, 12, 14.56, 24, 80)
RECIPES = ("naruto-1024", "naruto-256")


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """The named recipes with a base that has only its configuration."""
    folder = tmp_path_factory.mktemp("base")
    for part, config in (("unet", sdxl.UNET), ("vae", sdxl.VAE)):
        (folder / part).mkdir()
        (folder / part / "config.json").write_text(json.dumps(config))
    return lambda name, **changes: recipe.load(name, base=str(folder), vae="", **changes)


def down(made):
    """The plan and all its fallbacks after out-of-memory errors."""
    while made:
        yield made
        made = made.next()


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("gib", SIZES)
def test_the_chosen_rung_is_the_first_that_fits(named, name, gib):
    of = named(name)
    made = plan.plan(of, Card.of("card", gib), of.steps)
    taken = made.chosen.parts
    assert taken.reserved + taken.context <= gib * GIB
    before = made.rows[: made.rows.index(made.chosen)]
    assert all(row.parts.reserved > made.limit for row in before)
    assert all(of.pictures_per_step % row.rung.batch == 0 for row in made.rows)


@pytest.mark.parametrize("name", RECIPES)
def test_a_smaller_card_never_gets_a_faster_or_larger_rung(named, name):
    of = named(name)
    chosen = [plan.plan(of, Card.of("card", gib), of.steps).chosen for gib in SIZES]
    for smaller, larger in zip(chosen, chosen[1:], strict=False):
        assert smaller.parts.reserved <= larger.parts.reserved and smaller.seconds >= larger.seconds


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("gib, processors, sm", [(14.56, 40, 75), (80, 132, 90)])
def test_each_step_down_takes_less_until_there_is_none(named, name, gib, processors, sm):
    of = named(name)
    plans = list(down(plan.plan(of, Card.of("card", gib, sm, processors), of.steps)))
    taken = [made.chosen.parts.reserved for made in plans]
    assert len(plans) > 3 and all(b < a for a, b in zip(taken, taken[1:], strict=False))
    assert plans[-1].rung.weights == "host"  # exact to the end
    assert plans[0].rungs == [made.rung for made in plans]
    assert all(of.pictures_per_step % made.rung.batch == 0 for made in plans)


@pytest.mark.parametrize("name", RECIPES)
def test_a_t4_recomputes_nothing_and_keeps_the_micro_batch(named, name):
    of = named(name)
    rung = plan.plan(of, Card.of("T4", 14.56), of.steps).rung
    assert (rung.batch, rung.recompute, rung.weights, rung.graphed) == (of.batch, 0, "resident", True)


@pytest.mark.parametrize("name", RECIPES)
def test_a_fast_large_card_takes_the_step_in_one_micro_batch(named, name):
    of = named(name)
    rung = plan.plan(of, Card.of("H200", 140, 90, 132), of.steps).rung
    assert (rung.batch, rung.recompute) == (of.pictures_per_step, 0)


def test_as_few_layers_as_fit_are_recomputed(named):
    of = named("naruto-1024")
    made = plan.plan(of, Card.of("card", 8), of.steps)
    count = made.rung.recompute
    assert 0 < count < predict.shape_of(of).units
    one_less = plan._row("", "", plan.Rung(1, recompute=count - 1), of, made.card)
    assert one_less.parts.reserved > made.limit >= made.chosen.parts.reserved


def test_if_the_host_lacks_memory_the_weights_are_quantized(named):
    of = named("naruto-1024")
    assert plan.plan(of, Card.of("card", 6), of.steps).rung.weights == "host"
    assert plan.plan(of, Card.of("card", 6, host_gib=2), of.steps).rung.weights == "int8"


@pytest.mark.parametrize("name", RECIPES)
def test_if_no_rung_fits_the_error_names_a_card_that_would(named, name):
    of = named(name)
    with pytest.raises(RuntimeError, match=r"needs at least .* GiB of GPU memory, and small has 3\.5 GiB free: close"):
        plan.plan(of, Card.of("small", 4), of.steps)
    with pytest.raises(RuntimeError) as error:
        plan.plan(of, Card.of("small", 4), of.steps)
    card = float(str(error.value).rsplit("card with ", 1)[1].split()[0])
    assert plan.plan(of, Card.of("enough", card + 0.1), of.steps).chosen.parts.reserved + CONTEXT < (card + 0.1) * GIB


def test_it_compiles_if_the_steps_left_pay_for_it(named):
    of, card = named("naruto-1024"), Card.of("T4", 14.56)
    after, takes = plan.break_even(plan.plan(of, card, 1).rung, of, card)
    saved = takes / after  # seconds a step
    assert saved == pytest.approx(sum(plan.seconds(plan.Rung(1, compiled=c, graphed=True), of, card) * sign
                                      for c, sign in ((False, 1), (True, -1))))  # fmt: skip
    short, long = (plan.plan(of, card, steps) for steps in (math.floor(after), math.ceil(after) + 1))
    assert (short.rung.compiled, long.rung.compiled) == (False, True)
    assert f"; not compiled: compiling takes about {takes:.0f} s (assumed) and pays after" in short.sentence()
    assert f"; compiled: compiling takes about {takes:.0f} s" in long.sentence()
    without = Card("T4", card.free, 75, 40, card.host_free, triton=False)
    assert not plan.plan(of, without, of.steps).rung.compiled


def test_buckets_cost_one_compilation_a_shape(named):
    square, card = named("naruto-1024"), Card.of("T4", 14.56)
    rung = plan.Rung(1, graphed=True)
    assert plan.break_even(rung, square.replace(buckets=True), card) > plan.break_even(rung, square, card)
    many = named("naruto-256", buckets=True)
    assert not plan.plan(many, card, many.steps).rung.graphed and plan.plan(square, card, 765).rung.graphed


def test_the_plain_step_has_a_ladder_too(named):
    of = named("naruto-1024")
    for gib, recompute in ((14.56, 0), (8, predict.shape_of(of).units)):
        rung = plan.plan(of, Card.of("card", gib), of.steps, lean=False).rung
        assert (rung.lean, rung.recompute, rung.compiled, rung.graphed) == (False, recompute, False, False)


def test_on_a_cpu_it_is_one_row(base):
    of = recipe.load("naruto-256", base=base, vae="", resolution=32, precision="fp32")
    made = plan.plan(of, Card.here(torch.device("cpu")), of.steps)
    assert len(made.rows) == 1 and made.next() is None
    assert made.rung == plan.Rung(of.batch) and made.sentence().startswith("On the CPU: nothing recomputed")


def test_the_table_marks_the_chosen_rung(named):
    of = named("naruto-256")
    made = plan.plan(of, Card.of("card", 8), of.steps)
    rows = report.plan(made).rows
    marked = [row for row in rows if row[""]]
    assert [row["rung"] for row in marked] == [made.chosen.what] and len(rows) == len(made.rows)
    assert marked[0]["GiB, predicted"] == f"{made.chosen.parts.reserved / GIB:.1f}"
