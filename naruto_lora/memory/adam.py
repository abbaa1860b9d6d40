"""bitsandbytes' 8-bit AdamW (arXiv 2110.02861), with a dozen kernel launches an update instead of one a tensor."""

from __future__ import annotations

import dataclasses

import torch
from bitsandbytes import functional
from bitsandbytes.optim import AdamW8bit

BLOCK = 256  # values that share a scale, in bitsandbytes' kernel
PIECE = 2**21  # values updated at once: their gradients are copied, 8 MiB
STATES = ("state1", "state2", "absmax1", "absmax2")


class JoinedAdamW8bit(AdamW8bit):
    """The same values and the same state for each tensor as in its parent class, bit for bit.

    The parent waits for the GPU after each tensor, and SDXL's LoRA has 1,120. Here tensors whose length is a multiple
    of BLOCK are joined in memory, with their states, so that one call updates many; no block spans two tensors.
    """

    def __init__(self, parameters, **options):
        super().__init__(parameters, **options)
        self._make_pieces()

    @torch.no_grad()
    def step(self, closure=None):
        """One update; the parent's, if a gradient is missing."""
        if closure or any(p.grad is None for group in self.param_groups for p in group["params"]):
            loss = super().step(closure)
            self._make_pieces()  # step counts differ now
            return loss
        if not all(piece.is_joined() for piece in self.pieces):
            self._make_pieces()
        for piece in self.pieces:
            self._update(piece)
        for number, index in self.separate:
            group = self.param_groups[number]
            self.update_step(group, group["params"][index], number, index)

    def load_state_dict(self, *arguments, **options):
        """The parent's; the loaded states are joined."""
        super().load_state_dict(*arguments, **options)
        self._make_pieces()

    def _make_pieces(self) -> None:
        """Joins into `pieces` what can be updated together; lists the others in `separate`, by group and index.

        Done ahead of the updates: memory is then still free, and no CUDA graph holds any.
        """
        self.pieces, self.separate = [], []
        for number, group in enumerate(self.param_groups):
            together: dict[int, list] = {}  # by their count of updates
            for index, parameter in enumerate(group["params"]):
                state = self.state[parameter]
                if not state:
                    self.init_state(group, parameter, number, index)
                if state["state1"].dtype == torch.uint8 and parameter.numel() % BLOCK == 0:
                    together.setdefault(state["step"], []).append(parameter)
                else:
                    self.separate.append((number, index))
            for parameters in together.values():
                self.pieces += [_Piece.of(group, part, self.state) for part in _parts(parameters)]

    def _update(self, piece: _Piece) -> None:
        group, states = piece.group, piece.states
        for state in states:
            state["step"] += 1
        first, joined = states[0], piece.joined
        functional.optimizer_update_8bit_blockwise(
            self.optimizer_name, _flat(p.grad for p in piece.parameters), piece.weights, joined["state1"],
            joined["state2"], *group["betas"], 0.0, 0.0, group["eps"], first["step"], group["lr"], first["qmap1"],
            first["qmap2"], joined["absmax1"], joined["absmax2"], group["weight_decay"],
        )  # fmt: skip


@dataclasses.dataclass
class _Piece:
    """Parameters with equal step counts: views of `weights` (N,), and their states views of `joined`."""

    group: dict
    parameters: list[torch.Tensor]
    states: list[dict]
    weights: torch.Tensor
    joined: dict[str, torch.Tensor]
    addresses: list[int]

    @classmethod
    def of(cls, group: dict, parameters: list[torch.Tensor], state: dict) -> _Piece:
        states = [state[p] for p in parameters]
        weights, views = _join([p.data for p in parameters])
        for parameter, view in zip(parameters, views, strict=True):
            parameter.data = view
        joined = {}
        for name in STATES:
            joined[name], views = _join([each[name] for each in states])
            for each, view in zip(states, views, strict=True):
                each[name] = view
        return cls(group, parameters, states, weights, joined, [p.data_ptr() for p in parameters])

    def is_joined(self) -> bool:
        """Whether the parameters are still at their joined addresses."""
        return [p.data_ptr() for p in self.parameters] == self.addresses


def _flat(tensors) -> torch.Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _join(tensors: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """`tensors` joined into one (N,), and each of them as a view of it."""
    whole = _flat(tensors)
    parts = whole.split([tensor.numel() for tensor in tensors])
    return whole, [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def _parts(parameters: list[torch.Tensor]):
    """`parameters` in their order, in lists of at most PIECE values."""
    part: list[torch.Tensor] = []
    count = 0
    for parameter in parameters:
        if part and count + parameter.numel() > PIECE:
            yield part
            part, count = [], 0
        part.append(parameter)
        count += parameter.numel()
    if part:
        yield part
