"""The lean step against the plain one: the same losses and gradients, however weights and activations are stored."""

import functools
import threading

import pytest
import torch
import torch.nn.functional as F

from naruto_lora import lora, models, step
from naruto_lora.memory import fused, lean
from naruto_lora.memory.fallback import Rung

TOKENS = 45  # not a multiple of 8, which matrix products need


def loaded(base, rank=4, alpha=10.0):
    """The embedded U-Net with a LoRA that is not zero; its parameters."""
    unet = models.load_unet(base, torch.float32, "cpu")
    parameters = lora.inject(unet, rank, alpha)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return unet, parameters


def inputs(base, batch):
    generator = torch.Generator().manual_seed(2)
    latents, noise = torch.randn(2, batch, 4, 16, 8, generator=generator)  # not square
    return {
        "latents": latents,
        "noise": noise,
        "prompt_embeds": torch.randn(batch, TOKENS, 224, generator=generator),
        "pooled": torch.randn(batch, 128, generator=generator),
        "time_ids": torch.tensor([[64.0, 32, 0, 0, 64, 32]] * batch),
        "timesteps": torch.tensor([10, 500, 900])[:batch],
        "alphas_cumprod": models.load_alphas_cumprod(base),
    }


def gradients(parameters):
    return torch.cat([parameter.grad.flatten() for parameter in parameters])


def plain(base, batch):
    unet, parameters = loaded(base)
    engine = step.Plain(unet, parameters)
    losses = engine.accumulate(inputs(base, batch), torch.full((batch,), 2.0))
    return losses, gradients(parameters)


def error(value, reference):
    return float((value - reference).norm() / reference.norm())


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("recompute", [0, 5, 100])
def test_losses_and_gradients_equal_the_plain_steps(base, batch, recompute):
    losses, expected = plain(base, batch)
    unet, parameters = loaded(base)
    engine = lean.Lean(unet, parameters, Rung(batch, recompute=recompute))
    engine.zero_grad()
    assert error(engine.accumulate(inputs(base, batch), torch.full((batch,), 2.0)), losses) < 1e-6
    assert error(gradients(parameters), expected) < 1e-5
    engine.accumulate(inputs(base, batch), torch.full((batch,), 2.0))
    assert error(gradients(parameters), 2 * expected) < 1e-5  # they add up


def test_recomputing_keeps_less(base):
    """Counts the bytes that autograd holds for the backward pass."""

    def kept(recompute):
        unet, parameters = loaded(base)
        lean.Lean(unet, parameters, Rung(2, recompute=recompute))
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            step.diffusion_loss(unet, **inputs(base, 2))
        return sum(storage.nbytes() for storage in storages.values())

    everything = len(lean.units(loaded(base)[0]))
    assert kept(0) > kept(everything // 4) > kept(everything // 2)


@pytest.mark.slow
def test_compiled_it_computes_the_same(base, batch=1):
    losses, expected = plain(base, batch)
    unet, parameters = loaded(base)
    engine = lean.Lean(unet, parameters, Rung(batch, compiled=True))
    assert error(engine.accumulate(inputs(base, batch), torch.full((batch,), 2.0)), losses) < 1e-6
    assert error(gradients(parameters), expected) < 1e-5


def test_without_gradients_it_predicts_what_the_plain_unet_does(base):
    unet, parameters = loaded(base)
    given = inputs(base, 3)
    with torch.no_grad():
        expected = step.diffusion_loss(unet, **given)
        lean.Lean(unet, parameters, Rung(3, recompute=5))
        assert error(step.diffusion_loss(unet, **given), expected) < 1e-6


@pytest.mark.parametrize("shape", [(2, 64, 9, 7), (1, 64, 8, 8)])
def test_the_last_norm_rounds_only_its_result(base, shape):
    unet = models.load_unet(base, torch.float16, "cpu")
    norm, channels = unet.conv_norm_out, unet.conv_norm_out.num_channels
    x = torch.randn(shape[0], channels, *shape[2:], generator=torch.Generator().manual_seed(0)).half() * 3 + 1
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).half()
    exact = x.float().requires_grad_(True)
    expected = F.silu(F.group_norm(exact, norm.num_groups, norm.weight.float(), norm.bias.float(), norm.eps))
    expected.backward(grad.float())
    lean.Lean(unet, lora.inject(unet, 4, 4), Rung(2))
    x.requires_grad_(True)
    out = unet.conv_act(unet.conv_norm_out(x))
    out.backward(grad)
    assert out.dtype == x.grad.dtype == torch.float16
    assert torch.equal(out, expected.half())
    assert torch.allclose(x.grad, exact.grad.half(), rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(unet.conv_norm_out(x), expected.half())


def test_weights_on_the_host_are_exact_and_quantized_ones_nearly(base):
    losses, expected = plain(base, 3)
    off = {}
    for weights in ("host", "int8", "nf4"):
        unet, parameters = loaded(base)
        engine = lean.Lean(unet, parameters, Rung(3, weights=weights))
        off[weights] = error(engine.accumulate(inputs(base, 3), torch.full((3,), 2.0)), losses)
        block = unet.mid_block.attentions[0].transformer_blocks[0]
        assert block.ff.net[2].weight.numel() == block.attn1.to_k.base_layer.weight.numel() == 0  # nothing stored twice
    assert off["host"] < 1e-6 < off["int8"] < off["nf4"] < 0.1


def test_the_next_rung_reads_the_weights_that_the_one_before_stored(base):
    losses, expected = plain(base, 3)
    unet, parameters = loaded(base)
    for weights in ("resident", "host", "resident"):
        engine = lean.Lean(unet, parameters, Rung(3, recompute=2, weights=weights))
        engine.zero_grad()
        assert error(engine.accumulate(inputs(base, 3), torch.full((3,), 2.0)), losses) < 1e-6
        assert error(gradients(parameters), expected) < 1e-5


class Recorded:
    """Simulates a CUDA graph on a CPU: the recorded step runs again on inputs copied into its buffers."""

    def __init__(self, engine, inputs, seed):
        self.engine, self.inputs, self.seed = engine, {k: v.clone() for k, v in inputs.items()}, seed.clone()
        engine._micro_step(self.inputs, self.seed)

    def __call__(self, inputs, seed):
        for name, value in inputs.items():
            self.inputs[name].copy_(value)
        self.seed.copy_(seed)
        return self.engine._micro_step(self.inputs, self.seed)


def test_a_recorded_step_adds_its_gradients_and_the_recording_adds_none(base, monkeypatch):
    monkeypatch.setattr(lean, "_Graph", Recorded)
    _, once = plain(base, 3)
    unet, parameters = loaded(base)
    engine = lean.Lean(unet, parameters, Rung(3, graphed=True))
    for _ in range(lean.RECORD_AFTER + 2):
        engine.accumulate(inputs(base, 3), torch.full((3,), 2.0))
    assert engine.graph is not None
    assert error(gradients(parameters), (lean.RECORD_AFTER + 2) * once) < 1e-5
    engine.accumulate(inputs(base, 1), torch.full((1,), 2.0))  # an epoch's last batch releases the graph's memory
    assert engine.graph is None
    engine.accumulate(inputs(base, 3), torch.full((3,), 2.0))
    assert engine.graph is not None
    assert engine.release() and not engine.release()


def test_without_recording_and_compiling_it_continues_and_says_so(base, monkeypatch):
    def fails(*_):
        raise RuntimeError("not here\nand more")

    monkeypatch.setattr(lean, "_Graph", fails)
    monkeypatch.setattr(fused, "compiled", fails)
    losses, once = plain(base, 3)
    unet, parameters = loaded(base)
    engine = lean.Lean(unet, parameters, Rung(3, graphed=True, compiled=True))
    for _ in range(lean.RECORD_AFTER + 2):
        assert error(engine.accumulate(inputs(base, 3), torch.full((3,), 2.0)), losses) < 1e-6
    assert error(gradients(parameters), (lean.RECORD_AFTER + 2) * once) < 1e-5
    compiling, recording = engine.notes
    assert "torch.compile does not work here (not here" in compiling
    assert recording == "no CUDA graph can be recorded here (not here): training continues without it"


def test_a_recording_that_runs_out_of_memory_raises(base, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(lean, "_Graph", full)
    unet, parameters = loaded(base)
    engine = lean.Lean(unet, parameters, Rung(3, graphed=True))
    engine.shape, engine.seen = (3, 4, 16, 8), lean.RECORD_AFTER
    with pytest.raises(torch.OutOfMemoryError):
        engine.accumulate(inputs(base, 3), torch.full((3,), 2.0))


def test_an_unsupported_unet_is_refused_with_the_layers_name(base):
    unet, parameters = loaded(base)
    assert lean.unsupported(unet) is None
    unet.up_blocks[0].resnets[1].output_scale_factor = 2.0
    with pytest.raises(ValueError, match="up_blocks.0.resnets.1"):
        lean.Lean(unet, parameters, Rung(1))
    unet.conv_act = torch.nn.GELU()
    with pytest.raises(ValueError, match="last layers"):
        lean.Lean(unet, parameters, Rung(1))


def test_lora_on_other_layers_is_refused(base):
    unet, parameters = loaded(base)
    with pytest.raises(ValueError, match="to_out.0 only"):
        lean.Lean(unet, [*parameters, unet.conv_in.weight], Rung(1))


def test_compiled_functions_take_more_shapes_than_dynamos_default_in_any_thread(monkeypatch):
    """CUDA's backward passes run in their own thread, which has its own limits (torch 2.12)."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    ops, seen = fused.compiled("cpu"), []

    def call_with_many_shapes():
        for size in range(2, 14):
            x = torch.randn(1, 4, size, 2)
            out, mean, rstd = ops.group_norm(x, None, torch.ones(4), torch.zeros(4), 2, 1e-5, True)
            grad = ops.group_norm_backward(out, x, None, mean, rstd, torch.ones(4), torch.zeros(4), 2, 1e-5, True)
            seen.append((grad.shape == x.shape, torch._dynamo.config.recompile_limit))

    thread = threading.Thread(target=call_with_many_shapes)
    thread.start()
    thread.join()
    assert seen == [(True, fused.SHAPES)] * 12


def test_softmax_backward_equals_autograds():
    scores = torch.randn(2, 5, 8, dtype=torch.float64).requires_grad_()
    grad = torch.randn(2, 5, 8, dtype=torch.float64)
    share = (scores[..., :6] * 0.3).softmax(-1)
    (share * grad[..., :6]).sum().backward()
    ours = fused.softmax_backward(scores.detach(), grad, 0.3, 6)
    torch.testing.assert_close(ours[0][..., :6].float(), share.detach().float())
    torch.testing.assert_close(ours[1].float(), scores.grad.float())
    assert not ours[0][..., 6:].any()
