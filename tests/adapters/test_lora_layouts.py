"""Files of every layout, read: each must change the base as its own formula says."""

import copy

import pytest
import torch
from adapters.layouts import LAYOUTS, Maker
from safetensors.torch import save_file

from naruto_lora import pipeline

PARTS = ("unet", "text_encoder", "text_encoder_2")
TEXT = {"kohya_default", "ai_toolkit", "resized", "one_trainer_comfy", "one_trainer_original", "one_trainer_dotted",
        "one_trainer_diffusers", "checkpoint_names", "diffusers_with_patterns", "text_encoders_alone"}  # fmt: skip
TEXT_ALONE = {"checkpoint_names", "text_encoders_alone"}
STRENGTH, WITHIN = 0.75, 2e-6  # of the largest value


def seen(pipe) -> dict[str, torch.Tensor]:
    """What a prompt's embeddings are, and what the U-Net predicts from fixed ones."""
    generator = torch.Generator().manual_seed(0)
    config = pipe.unet.config
    shapes = (2, 4, 8, 8), (2, 48, config.cross_attention_dim)
    latents, embeds = (torch.randn(shape, generator=generator) for shape in shapes)
    pooled = torch.randn((2, pipe.text_encoder_2.config.projection_dim), generator=generator)
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[32.0, 32, 0, 0, 32, 32]] * 2)}
    with torch.no_grad():
        prompt, _, pooled, _ = pipe.encode_prompt("a bearded man with glasses", do_classifier_free_guidance=False)
        unet = pipe.unet(latents, torch.tensor([100, 900]), embeds, added_cond_kwargs=added).sample
    return {"unet": unet, "prompt": prompt, "pooled": pooled}


@pytest.fixture(scope="module")
def fresh(base):
    """A pipeline for these tests alone; each leaves it without adapters."""
    return pipeline.load(base)


@pytest.fixture(scope="module")
def untouched(fresh):
    return seen(fresh)


@pytest.fixture
def pipe(fresh, untouched):
    """`fresh`; after each test the base must be the base, first with the adapters off, then without them."""
    yield fresh
    pipeline.use_adapter(fresh, "base")
    off = seen(fresh)
    assert all(torch.equal(untouched[key], off[key]) for key in off)
    for name in pipeline.active.loaded(fresh):
        pipeline.active.remove_adapter(fresh, name)
    assert all(torch.equal(untouched[key], value) for key, value in seen(fresh).items())


def write(make, folder):
    name = "adapter_model.safetensors" if make.beside else "style.safetensors"
    save_file({key: value.contiguous() for key, value in make.tensors.items()}, folder / name, make.header or None)
    for other, text in make.beside.items():
        (folder / other).write_text(text)
    return folder / name


def changed_by_hand(pipe, added, strength=1.0):
    """What a base sees whose weights were changed; the weights are put back."""
    base = pipeline.active.modules(pipe)
    weights = [(base[part][module], difference)
               for part, modules in added.items() for module, difference in modules.items()]
    before = [module.weight.data for module, _ in weights]
    for module, difference in weights:
        module.weight.data = module.weight.data + strength * difference
    try:
        return seen(pipe)
    finally:
        for (module, _), weight in zip(weights, before, strict=True):
            module.weight.data = weight


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_file_changes_the_base_as_its_formula_says(name, pipe, untouched, tmp_path, capsys):
    """At a strength unlike 1: with DoRA too it is a share of the way from the base."""
    make = Maker(pipeline.active.modules(pipe))
    LAYOUTS[name](make)
    right, state = changed_by_hand(pipe, make.added, STRENGTH), torch.get_rng_state()
    pipeline.add_adapter(pipe, "style", write(make, tmp_path))
    assert torch.equal(state, torch.get_rng_state())
    pipeline.use_adapter(pipe, "style", STRENGTH)
    found = seen(pipe)
    for key, value in right.items():
        largest = value.abs().max()
        effect = (value - untouched[key]).abs().max() / largest
        changes = name not in TEXT_ALONE if key == "unet" else name in TEXT
        assert effect > 0.003 if changes else torch.equal(found[key], untouched[key]), (key, effect)
        assert (found[key] - value).abs().max() / largest < WITHIN, key
    said = capsys.readouterr().out
    assert ("1 embeddings of words" in said) if name == "one_trainer_original" else not said


def test_adapters_of_different_parts_are_mixed(pipe, untouched, tmp_path):
    makers = {}
    for name in ("resized", "text_encoders_alone", "lokr_low_rank"):
        make = makers[name] = Maker(pipeline.active.modules(pipe))
        LAYOUTS[name](make)
        make.added = copy.deepcopy(make.added)
    weights = {"resized": 0.5, "text_encoders_alone": 1.0, "lokr_low_rank": 0.25}
    added = {part: {} for part in PARTS}
    for name, make in makers.items():
        for part, modules in make.added.items():
            for module, difference in modules.items():
                added[part][module] = added[part].get(module, 0) + weights[name] * difference
    right = changed_by_hand(pipe, added)
    for name, make in makers.items():
        (tmp_path / name).mkdir()
        pipeline.add_adapter(pipe, name, write(make, tmp_path / name).parent)
    assert pipeline.use_adapter(pipe, weights) == weights
    found = seen(pipe)
    for key, value in right.items():
        assert (found[key] - value).abs().max() / value.abs().max() < WITHIN
    pipeline.use_adapter(pipe, "base")
    assert all(torch.equal(untouched[key], value) for key, value in seen(pipe).items())


def test_encoded_prompts_are_kept_for_each_adapter_of_a_text_encoder(pipe, untouched, tmp_path):
    """Base, adapter, base, half the adapter: each has embeddings of its own, and none is encoded twice."""
    make = Maker(pipeline.active.modules(pipe))
    LAYOUTS["text_encoders_alone"](make)
    pipeline.add_adapter(pipe, "words", write(make, tmp_path))
    options = dict(steps=2, resolution=32, guidance_scale=1.0)
    encoded, whole = [], pipe.encode_prompt
    pipe.encode_prompt = lambda prompt=None, *rest, **given: (encoded.append(prompt), whole(prompt, *rest, **given))[1]
    try:
        uses = [("base", 1), ("words", 1), ("base", 1), ("words", 0.5), ("words", 1)]
        drawn = [pipeline.draw(pipe, ["a red bird"], 3, use, scale, **options)[0].tobytes() for use, scale in uses]
    finally:
        del pipe.encode_prompt
    assert drawn[0] == drawn[2] and drawn[1] == drawn[4] and len(set(drawn)) == 3
    assert encoded.count("a red bird") == 3
