"""bitsandbytes' 8-bit AdamW (arXiv 2110.02861), a dozen launches an update in place of one a tensor."""

from __future__ import annotations

import dataclasses

import torch
from bitsandbytes import functional
from bitsandbytes.optim import AdamW8bit

BLOCK = 256  # numbers that share a scale, in bitsandbytes' kernel
PIECE = 2**21  # numbers updated at once: their gradients are copied, 8 MiB
STATES = ("state1", "state2", "absmax1", "absmax2")


class AdamW8bitTogether(AdamW8bit):
    """The same numbers and the same state, tensor by tensor, as its parent's.

    The parent waits for the GPU after each tensor, and SDXL's LoRA has 1,120. Here tensors that are whole blocks long
    are laid one after the other in memory, with their states, so that one call updates many: their blocks stay theirs.
    """

    def __init__(self, parameters, **options):
        super().__init__(parameters, **options)
        self._lay_out()

    @torch.no_grad()
    def step(self, closure=None):
        """One update; one without all gradients is the parent's."""
        if closure or any(p.grad is None for group in self.param_groups for p in group["params"]):
            loss = super().step(closure)
            self._lay_out()  # some have been stepped more often now
            return loss
        if not all(piece.in_place() for piece in self.pieces):
            self._lay_out()
        for piece in self.pieces:
            self._update(piece)
        for number, place in self.alone:
            group = self.param_groups[number]
            self.update_step(group, group["params"][place], number, place)

    def load_state_dict(self, *arguments, **options):
        """The parent's."""
        super().load_state_dict(*arguments, **options)
        self._lay_out()

    def _lay_out(self) -> None:
        """Makes `pieces` of what can be updated together, and lists what is updated `alone`, by group and place.

        Now and not in an update: memory is then still free, and no CUDA graph holds any.
        """
        self.pieces, self.alone = [], []
        for number, group in enumerate(self.param_groups):
            together = {}
            for place, parameter in enumerate(group["params"]):
                state = self.state[parameter]
                if not state:
                    self.init_state(group, parameter, number, place)
                if state["state1"].dtype == torch.uint8 and parameter.numel() % BLOCK == 0:
                    together.setdefault(state["step"], []).append(parameter)
                else:
                    self.alone.append((number, place))
            for parameters in together.values():
                self.pieces += [_Piece.of(group, part, self.state) for part in _parts(parameters)]

    def _update(self, piece: _Piece) -> None:
        group, states = piece.group, piece.states
        for state in states:
            state["step"] += 1
        first, whole = states[0], piece.whole
        functional.optimizer_update_8bit_blockwise(
            self.optimizer_name, _joined(p.grad for p in piece.parameters), piece.weights, whole["state1"],
            whole["state2"], *group["betas"], 0.0, 0.0, group["eps"], first["step"], group["lr"], first["qmap1"],
            first["qmap2"], whole["absmax1"], whole["absmax2"], group["weight_decay"],
        )  # fmt: skip


@dataclasses.dataclass
class _Piece:
    """Parameters that were stepped equally often, one after the other in `weights` (N,), their states in `whole`."""

    group: dict
    parameters: list[torch.Tensor]
    states: list[dict]
    weights: torch.Tensor
    whole: dict[str, torch.Tensor]
    addresses: list[int]

    @classmethod
    def of(cls, group: dict, parameters: list[torch.Tensor], state: dict) -> _Piece:
        states = [state[p] for p in parameters]
        weights, views = _laid([p.data for p in parameters])
        for parameter, view in zip(parameters, views, strict=True):
            parameter.data = view
        whole = {}
        for name in STATES:
            whole[name], views = _laid([each[name] for each in states])
            for each, view in zip(states, views, strict=True):
                each[name] = view
        return cls(group, parameters, states, weights, whole, [p.data_ptr() for p in parameters])

    def in_place(self) -> bool:
        """Whether the parameters still lie where they were laid."""
        return [p.data_ptr() for p in self.parameters] == self.addresses


def _joined(tensors) -> torch.Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _laid(tensors: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """`tensors` one after the other, and each as a view of that."""
    whole = _joined(tensors)
    parts = whole.split([tensor.numel() for tensor in tensors])
    return whole, [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def _parts(parameters: list[torch.Tensor]):
    """`parameters` in their order, in lists of at most PIECE numbers."""
    part, count = [], 0
    for parameter in parameters:
        if part and count + parameter.numel() > PIECE:
            yield part
            part, count = [], 0
        part.append(parameter)
        count += parameter.numel()
    if part:
        yield part
