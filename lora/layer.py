"""A linear layer that low-rank adapters can sit on (LoRA, Hu et al. 2021, section 4.1)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


class Adapter(nn.Module):
    """The low-rank update x -> (alpha / r) B A x of one linear layer.

    A starts normal with standard deviation 1 / r and B at zero, so that a fresh adapter changes nothing. The weights
    and their arithmetic are float32 whatever the base is cast to: test-time training moves them by 1e-6 a step, which
    bfloat16 copies of them would not see.
    """

    def __init__(self, linear: nn.Linear, spec: AdapterSpec, dropout: float, generator: torch.Generator | None) -> None:
        super().__init__()
        self.spec = spec
        self.dropout = dropout
        a = torch.randn(spec.rank, linear.in_features, generator=generator) / spec.rank
        self.A = nn.Parameter(a.to(linear.weight.device))
        self.B = nn.Parameter(torch.zeros(linear.out_features, spec.rank, device=linear.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the dtype of x; dropout on x while training."""
        dropped = F.dropout(x.float(), self.dropout, self.training)
        scale = self.spec.alpha / self.spec.rank
        return (F.linear(F.linear(dropped, self.A), self.B) * scale).to(x.dtype)

    def delta(self) -> Tensor:
        """The update as a matrix (out, in), float32."""
        return self.B @ self.A * (self.spec.alpha / self.spec.rank)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Adapter":
        # Follow the base to its device, never to its dtype.
        return super()._apply(lambda t: t.to(fn(t.new_empty(0)).device), recurse)


class LoRALinear(nn.Linear):
    """nn.Linear with named adapters beside `weight` and `bias`, which keep their names in checkpoints.

    Attributes:
        adapters: all adapters that sit here, by name.
        scales: those that are on and how strongly; the others cost nothing.
        original: the weight before `merge`, or None.
    """

    adapters: nn.ModuleDict
    scales: dict[str, float]
    original: Tensor | None

    @classmethod
    def wrap(cls, linear: nn.Linear) -> "LoRALinear":
        """A LoRALinear that shares the weight and bias of `linear`."""
        wrapped = cls.__new__(cls)
        nn.Module.__init__(wrapped)
        wrapped.in_features, wrapped.out_features = linear.in_features, linear.out_features
        wrapped.weight, wrapped.bias = linear.weight, linear.bias
        wrapped.adapters, wrapped.scales, wrapped.original = nn.ModuleDict(), {}, None
        return wrapped.train(linear.training)

    def unwrap(self) -> nn.Linear:
        """The plain linear layer again, with the same weight and bias."""
        linear = nn.Linear.__new__(nn.Linear)
        nn.Module.__init__(linear)
        linear.in_features, linear.out_features = self.in_features, self.out_features
        linear.weight, linear.bias = self.weight, self.bias
        return linear.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out): the layer's own output and that of every adapter that is on."""
        out = F.linear(x, self.weight, self.bias)
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
        merged = self.weight.float() + sum(scale * self.adapters[name].delta() for name, scale in present.items())
        self.weight.copy_(merged)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Undo `merge`, bit for bit."""
        if self.original is not None:
            self.weight.copy_(self.original)
            self.original = None
