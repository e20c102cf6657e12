"""Layers that low-rank adapters can sit on: linear ones (LoRA, Hu et al. 2021, section 4.1), and convolutions."""

import re
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Scale = float | Mapping[int, float]  # of an adapter: one, or by layer of the nine, those not named being off


@dataclass(frozen=True)
class AdapterSpec:
    """What an adapter is: enough to build it again on another network of the same shape.

    Args:
        kind: "spatial" (in the spatial transformers) or "temporal" (in the motion modules).
        layers: the layers of the nine it sits in.
        rank: r, the inner width of B A.
        alpha: the adapter's output is scaled by alpha / rank.
        targets: which linear layers: a name of `lora.network.TARGETS`.
    """

    kind: str
    layers: tuple[int, ...]
    rank: int
    alpha: float
    targets: str = "blocks"


@dataclass(frozen=True)
class LowRank:
    """The update of one layer as numbers: (alpha / r) B A.

    Args:
        A: (r, in) for a linear layer, (r, in, k, k) for a convolution.
        B: (out, r) for a linear layer, (out, r, 1, 1) for a convolution.
        alpha: the update is scaled by alpha / r.
    """

    A: Tensor
    B: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """r, the inner width."""
        return len(self.A)


def layer_of(path: str) -> int | None:
    """Which of the nine layers a part of the UNet belongs to by its name; None: to none of them."""
    found = re.match(r"layers\.(\d+)\.", path)
    return int(found[1]) if found else None


def scale_at(path: str, scale: Scale) -> float:
    """An adapter's scale on the part of the network that has this name."""
    if not isinstance(scale, Mapping):
        return scale
    layer = layer_of(path)
    return 0.0 if layer is None else scale.get(layer, 0.0)


class Adapter(nn.Module):
    """The low-rank update x -> (alpha / r) B A x of one layer.

    The weights and their arithmetic are float32 whatever the base is cast to: test-time training moves them by 1e-6 a
    step, which bfloat16 copies of them would not see.

    Attributes:
        spec: what it was made by; None where its weights were given, and other layers may have another rank or alpha.
    """

    def __init__(self, weights: LowRank, spec: AdapterSpec | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        self.spec = spec
        self.alpha = weights.alpha
        self.dropout = dropout
        self.A = nn.Parameter(weights.A)
        self.B = nn.Parameter(weights.B)

    @classmethod
    def fresh(
        cls, linear: nn.Linear, spec: AdapterSpec, dropout: float, generator: torch.Generator | None
    ) -> "Adapter":
        """One that changes nothing yet: A starts normal with standard deviation 1 / r, and B at zero."""
        a = torch.randn(spec.rank, linear.in_features, generator=generator) / spec.rank
        device = linear.weight.device
        b = torch.zeros(linear.out_features, spec.rank, device=device)
        return cls(LowRank(a.to(device), b, spec.alpha), spec, dropout)

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha / len(self.A)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the dtype of x; dropout on x while training."""
        dropped = F.dropout(x.float(), self.dropout, self.training)
        return (F.linear(F.linear(dropped, self.A), self.B) * self.scale).to(x.dtype)

    def delta(self) -> Tensor:
        """The update as a matrix (out, in), float32; that of a convolution has its last axes (in, k, k) in one."""
        return self.B.flatten(1) @ self.A.flatten(1) * self.scale

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Adapter":
        # Follow the base to its device, never to its dtype.
        return super()._apply(lambda t: t.to(fn(t.new_empty(0)).device), recurse)


class ConvAdapter(Adapter):
    """The update of a convolution: A is one of r channels, with the same stride and padding, B one of 1x1 (LoCon)."""

    def __init__(self, weights: LowRank, conv: nn.Conv2d) -> None:
        super().__init__(weights)
        self.steps: dict[str, Any] = {"stride": conv.stride, "padding": conv.padding}

    def forward(self, x: Tensor) -> Tensor:
        """(n, in, h, w) -> (n, out, h', w'), in the dtype of x."""
        return (F.conv2d(F.conv2d(x.float(), self.A, **self.steps), self.B) * self.scale).to(x.dtype)


class LoRALayer(nn.Module):
    """A layer with named adapters beside `weight` and `bias`, which keep their names in checkpoints.

    Attributes:
        adapters: all adapters that sit here, by name.
        scales: those that are on and how strongly; the others cost nothing.
        original: the weight before `merge`, or None.
    """

    weight: Tensor
    adapters: nn.ModuleDict
    scales: dict[str, float]
    original: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """The layer's own output and that of every adapter that is on."""
        out = super().forward(x)  # the plain layer's, which stands behind this class in LoRALinear and LoRAConv2d
        for name, scale in self.scales.items():
            out = out + scale * self.adapters[name](x)
        return out

    @torch.no_grad()
    def merge(self, scales: dict[str, float]) -> None:
        """Add the scaled updates to the weight itself; `unmerge` brings the very same weight back."""
        present = {name: scale for name, scale in scales.items() if name in self.adapters}
        if not present:
            return
        self.original = self.weight.detach().clone()
        updates = sum(scale * self._adapter(name).delta() for name, scale in present.items())
        self.weight.copy_((self.weight.float().flatten(1) + updates).view_as(self.weight))

    @torch.no_grad()
    def unmerge(self) -> None:
        """Undo `merge`, bit for bit."""
        if self.original is not None:
            self.weight.copy_(self.original)
            self.original = None

    def unwrap(self) -> nn.Module:
        """The plain layer again, with the same weight and bias."""
        plain = _recast(self, PLAIN[type(self)])
        del plain._modules["adapters"], plain.__dict__["scales"], plain.__dict__["original"]
        return plain

    def _adapter(self, name: str) -> Adapter:
        adapter = self.adapters[name]
        assert isinstance(adapter, Adapter)
        return adapter


class LoRALinear(LoRALayer, nn.Linear):
    """nn.Linear with adapters."""


class LoRAConv2d(LoRALayer, nn.Conv2d):
    """nn.Conv2d with adapters."""


PLAIN: dict[type, type[nn.Module]] = {LoRALinear: nn.Linear, LoRAConv2d: nn.Conv2d}


def wrap(layer: nn.Module) -> LoRALayer:
    """A layer that shares the weight and bias of a plain `layer` (nn.Linear or nn.Conv2d), and has room for adapters.

    One that has it already comes back as it is.
    """
    if isinstance(layer, LoRALayer):
        return layer
    wrapped = _recast(layer, LoRAConv2d if isinstance(layer, nn.Conv2d) else LoRALinear)
    assert isinstance(wrapped, LoRALayer)
    wrapped.adapters, wrapped.scales, wrapped.original = nn.ModuleDict(), {}, None
    return wrapped


def _recast(layer: nn.Module, cls: type[nn.Module]) -> nn.Module:
    """The same parameters and settings as another class; tables are copied, so that neither sees the other's."""
    other = object.__new__(cls)
    other.__dict__ = {name: copy(value) if isinstance(value, dict) else value for name, value in vars(layer).items()}
    return other
