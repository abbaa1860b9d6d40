"""bitsandbytes' 8-bit AdamW (arXiv 2110.02861), a few launches an update in place of one a tensor."""

from __future__ import annotations

import torch
from bitsandbytes import functional
from bitsandbytes.optim import AdamW8bit

BLOCK = 256  # numbers that share a scale, in bitsandbytes' kernel
PIECE = 2**21  # numbers updated at once: copies of 8 MiB


class AdamW8bitTogether(AdamW8bit):
    """The same numbers and the same state, tensor by tensor, as its parent's.

    The parent waits for the GPU after each tensor, and SDXL's LoRA has 1,120. Here tensors are copied one after the
    other into a long one and back: the copies cost less, and where each is whole blocks long its blocks are its own.
    """

    @torch.no_grad()
    def step(self, closure=None):
        """One update; the first of a session is the parent's, which makes the states."""
        rows = [
            (group, self.state.get(p), p, (number, place))
            for number, group in enumerate(self.param_groups)
            for place, p in enumerate(group["params"])
            if p.grad is not None
        ]
        if closure or not self.initialized or not all(state for _, state, *_ in rows):
            return super().step(closure)
        together = {}
        for group, state, parameter, where in rows:
            if state["state1"].dtype == torch.uint8 and parameter.numel() % BLOCK == 0:
                together.setdefault((where[0], state["step"]), []).append(parameter)
            else:
                self.update_step(group, parameter, *where)
        for (number, _), parameters in together.items():
            for piece in _pieces(parameters):
                self._update(self.param_groups[number], piece)

    def _update(self, group: dict, parameters: list[torch.Tensor]) -> None:
        """Steps `parameters`, all after as many steps, with one launch of bitsandbytes' kernel."""
        states = [self.state[p] for p in parameters]
        for state in states:
            state["step"] += 1
        names = ("state1", "state2", "absmax1", "absmax2")
        parts = [[state[name] for state in states] for name in names] + [[p.data for p in parameters]]
        state1, state2, absmax1, absmax2, weights = (_joined(each) for each in parts)
        functional.optimizer_update_8bit_blockwise(
            self.optimizer_name, _joined([p.grad for p in parameters]), weights, state1, state2, *group["betas"], 0.0,
            group.get("alpha", 0.0), group["eps"], states[0]["step"], group["lr"], states[0]["qmap1"],
            states[0]["qmap2"], absmax1, absmax2, group["weight_decay"],
        )  # fmt: skip
        for whole, each in zip((state1, state2, absmax1, absmax2, weights), parts, strict=True):
            torch._foreach_copy_([part.view(-1) for part in each], whole.split([part.numel() for part in each]))


def _joined(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _pieces(parameters: list[torch.Tensor]):
    """`parameters` in their order, in lists of at most PIECE numbers."""
    piece, count = [], 0
    for parameter in parameters:
        if piece and count + parameter.numel() > PIECE:
            yield piece
            piece, count = [], 0
        piece.append(parameter)
        count += parameter.numel()
    if piece:
        yield piece
