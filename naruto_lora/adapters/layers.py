"""What one layer of an adapter adds to a weight W: LoRA, LoHa, LoKr, a whole difference, each also with DoRA.

Each is applied exactly, as a pair of modules (A, B) that peft calls as B(A(x)) * scaling. Sources: LoRA arXiv
2106.09685; LoHa and LoKr arXiv 2309.14859 (LyCORIS); DoRA arXiv 2402.09353.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

ALGORITHMS = {  # what a layer must have: what it is
    ("down", "up"): "LoRA",
    ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"): "LoHa",
    ("diff",): "a whole difference",
}


@dataclass(frozen=True)
class Layer:
    """One layer as its file has it: tensors by their names in `names.split`, fp32, and alpha (None: not given)."""

    tensors: dict[str, torch.Tensor]
    alpha: float | None = None

    @property
    def algorithm(self) -> str | None:
        """LoRA, LoHa, LoKr or 'a whole difference'; None if it can't be applied or lacks a part."""
        own = self.tensors.keys()
        if self.unsupported:
            return None
        for needed, algorithm in ALGORITHMS.items():
            if own >= set(needed):
                return algorithm
        both = all(own & {f"lokr_w{k}"} or own >= {f"lokr_w{k}_a", f"lokr_w{k}_b"} for k in (1, 2))
        return "LoKr" if both else None

    @property
    def unsupported(self) -> str | None:
        """The name of what it holds and can't be applied here, such as 'OFT'."""
        found = [what for name, what in UNSUPPORTED.items() if name in self.tensors]
        found += ["OFT" for name in self.tensors if name.startswith(("oft_", "boft_"))]
        return found[0] if found else None

    @property
    def rank(self) -> int:
        """The rank by which alpha is divided; 1 where alpha has no meaning."""
        for name, axis in (("down", 0), ("hada_w1_b", 0), ("lokr_w2_b", 0), ("lokr_w1_b", 0)):
            if name in self.tensors:
                return self.tensors[name].shape[axis]
        return 1

    @property
    def strength(self) -> float:
        """alpha / rank, times LyCORIS's `scalar`; 1 without alpha, or where both halves of a LoKr are whole."""
        scalar = float(self.tensors["scalar"]) if "scalar" in self.tensors else 1.0
        whole = self.algorithm == "a whole difference" or {"lokr_w1", "lokr_w2"} <= self.tensors.keys()
        return scalar if self.alpha is None or whole else scalar * self.alpha / self.rank

    def low_rank(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(up, down), flat: up (out, r) @ down (r, in * kernel) is the difference; None for what has no low rank.

        A LoHa of rank r is a LoRA of rank r * r (the row-wise Khatri-Rao product), as long as that is smaller.
        """
        own = self.tensors
        if self.algorithm == "LoRA":
            down = own["down"]
            if "mid" in own:  # Tucker: (r, r, kernel)
                down = torch.einsum("pqkl,qi->pikl", own["mid"], down.flatten(1))
            return own["up"].flatten(1), down.flatten(1)
        if self.algorithm == "LoHa" and "hada_t1" not in own:
            (a, b), (c, d) = ((own[f"hada_w{k}_a"], own[f"hada_w{k}_b"]) for k in (1, 2))
            if len(b) * len(d) < min(len(a), b.shape[1]):
                return (a[:, :, None] * c[:, None]).flatten(1), (b[:, None] * d[None]).flatten(0, 1)
        return None

    def kronecker(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(w1, w2) of a LoKr, whose Kronecker product is the difference; w2 can have a kernel."""
        if self.algorithm != "LoKr":
            return None
        return _factor(self.tensors, 1).flatten(1), _factor(self.tensors, 2)

    def difference(self) -> torch.Tensor:
        """All that it adds to the weight at strength 1, (out, in * kernel), without DoRA."""
        if pair := self.low_rank():
            return pair[0] @ pair[1] * self.strength
        if pair := self.kronecker():
            return torch.kron(pair[0], pair[1].flatten(1)) * self.strength
        if self.algorithm == "LoHa":
            return (_hada(self.tensors, 1) * _hada(self.tensors, 2)).flatten(1) * self.strength
        return self.tensors["diff"].flatten(1) * self.strength

    def fits(self, base: nn.Module) -> bool:
        """Whether the difference has the shape of this base's weight."""
        out, flat = base.weight.shape[0], base.weight[0].numel()
        try:
            with torch.device("meta"):
                shadow = Layer({name: torch.empty(t.shape) for name, t in self.tensors.items() if name != "scalar"})
                return shadow.difference().shape == (out, flat) and self._dora_fits(base.weight)
        except (RuntimeError, IndexError, KeyError):  # halves that don't belong together
            return False

    def _dora_fits(self, weight: torch.Tensor) -> bool:
        return "dora_scale" not in self.tensors or self.tensors["dora_scale"].numel() in weight.shape[:2]

    def modules(self, base: nn.Module) -> tuple[nn.Module, nn.Module, int, float]:
        """(A, B, rank, alpha) for peft's layer on `base`, on its device and in its dtype."""
        if "dora_scale" in self.tensors:
            return Decomposed(self, base), Same(), 1, 1.0
        if pair := self.low_rank():
            up, down = pair
            first = _like(base, down.reshape(len(down), *base.weight.shape[1:]))
            shape = (*up.shape, 1, 1) if isinstance(base, nn.Conv2d) else up.shape
            return first, _plain(base, up.reshape(shape)), len(down), self.strength * len(down)
        if pair := self.kronecker():
            return Kronecker(base, *pair), Same(), 1, self.strength
        whole = self.difference().reshape(base.weight.shape) / (self.strength or 1.0)
        return _like(base, whole), Same(), 1, self.strength


UNSUPPORTED = {  # what has no place here, by what its files have
    "on_input": "IA3", "a1": "GLoRA", "w_norm": "norms", "b_norm": "norms", "diff_b": "biases", "bias": "biases",
    "set_weight": "weights set anew",
}  # fmt: skip


def _factor(own: dict[str, torch.Tensor], k: int) -> torch.Tensor:
    """One factor of a LoKr: whole, of low rank, or Tucker-decomposed."""
    if f"lokr_w{k}" in own:
        return own[f"lokr_w{k}"]
    return _product(own[f"lokr_w{k}_a"], own[f"lokr_w{k}_b"], own.get(f"lokr_t{k}"))


def _hada(own: dict[str, torch.Tensor], k: int) -> torch.Tensor:
    return _product(own[f"hada_w{k}_a"], own[f"hada_w{k}_b"], own.get(f"hada_t{k}"))


def _product(a: torch.Tensor, b: torch.Tensor, core: torch.Tensor | None) -> torch.Tensor:
    """a (out, r) @ b (r, in); with a Tucker core (r, r, kernel) a is (r, out), and the result (out, in, kernel)."""
    return a @ b.flatten(1) if core is None else torch.einsum("ijkl,jr,ip->prkl", core, b, a).contiguous()


def _like(base: nn.Module, weight: torch.Tensor) -> nn.Module:
    """A layer that moves over its input as `base` does, with another weight and no bias."""
    with torch.device("meta"):
        if isinstance(base, nn.Conv2d):
            moves = {name: getattr(base, name) for name in ("stride", "padding", "dilation")}
            made = nn.Conv2d(weight.shape[1], len(weight), weight.shape[2:], bias=False, **moves)
        else:
            made = nn.Linear(weight.shape[1], len(weight), bias=False)
    return _filled(made, base, weight)


def _plain(base: nn.Module, weight: torch.Tensor) -> nn.Module:
    """A Linear, or for a convolution one of 1 x 1, with `weight`."""
    with torch.device("meta"):
        kind = nn.Linear(*weight.shape[1::-1], bias=False) if weight.dim() == 2 else nn.Conv2d(
            weight.shape[1], len(weight), 1, bias=False)
    return _filled(kind, base, weight)


def _filled(made: nn.Module, base: nn.Module, weight: torch.Tensor) -> nn.Module:
    made.weight = _frozen(weight, base)
    return made


def _frozen(value: torch.Tensor, base: nn.Module) -> nn.Parameter:
    return nn.Parameter(value.to(base.weight.device, base.weight.dtype).contiguous(), requires_grad=False)


class Same(nn.Module):
    """Returns its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Kronecker(nn.Module):
    """x times (w1 ⊗ w2), without forming the product: for an input of i1 * i2 features, w2 on each of i1 groups."""

    def __init__(self, base: nn.Module, w1: torch.Tensor, w2: torch.Tensor):
        super().__init__()
        w2 = w2.reshape(*w2.shape[:2], *base.weight.shape[2:]) if w2.dim() > 2 or base.weight.dim() == 2 else (
            w2.reshape(len(w2), -1, *base.weight.shape[2:]))
        self.weight, self.inner = _frozen(w1, base), _like(base, w2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        groups = self.weight.shape[1]
        if isinstance(self.inner, nn.Linear):
            inner = self.inner(x.unflatten(-1, (groups, -1)))  # (..., i1, o2)
            return (self.weight @ inner).flatten(-2)
        inner = self.inner(x.unflatten(1, (groups, -1)).flatten(0, 1)).unflatten(0, (len(x), groups))
        return torch.einsum("oi,bi...->bo...", self.weight, inner).flatten(1, 2)


class Decomposed(nn.Module):
    """DoRA: W + difference, each row (or column) scaled to the length that was learned; gives what that adds to W.

    The strength of an adapter is between W and the result, as in ComfyUI. The length that it is compared with is that
    of W + difference, as in LyCORIS and peft; ComfyUI takes that of W for rows, so pictures there differ a little.
    """

    def __init__(self, layer: Layer, base: nn.Module):
        super().__init__()
        plain = Layer({name: t for name, t in layer.tensors.items() if name != "dora_scale"}, layer.alpha)
        self.first, self.second, rank, alpha = plain.modules(base)
        self.strength, self.base = alpha / rank, (base,)  # in a tuple: it is not a part of this module
        shape, learned = base.weight.shape, layer.tensors["dora_scale"]
        merged = base.weight.float() + layer.difference().to(base.weight.device).reshape(shape)
        self.rows = learned.shape[0] == shape[0]
        lengths = merged.flatten(1).norm(dim=1) if self.rows else merged.transpose(0, 1).flatten(1).norm(dim=1)
        lengths = lengths + torch.finfo(torch.float32).eps
        scale = learned.flatten().to(lengths.device) / lengths
        around = (-1, 1, 1) if isinstance(base, nn.Conv2d) else (-1,)
        self.weight = _frozen(scale.reshape(around), base)
        self.change = _frozen((scale - 1).reshape(around), base)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.rows:
            return self._added(x) * self.weight + self._base(x) * self.change
        return self._added(x * self.weight) + self._base(x * self.change)

    def _added(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x)) * self.strength

    def _base(self, x: torch.Tensor) -> torch.Tensor:
        (base,) = self.base
        if isinstance(base, nn.Conv2d):
            return functional.conv2d(x, base.weight, None, base.stride, base.padding, base.dilation, base.groups)
        return functional.linear(x, base.weight)
