"""Where adapters sit in the UNet, and how they are switched, scaled and merged.

The layer sets are those of CustomTTT, section 3.2: appearance in the spatial transformers of layers 2 and 6, motion in
the motion modules of layers 2 and 5. All functions take the network as their first argument and leave no other trace
in it than the `LoRALayer`s themselves. Those that ask for `network` work on any module: the text encoder has adapters
too, in other people's files.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from lora.layer import Adapter, AdapterSpec, ConvAdapter, LoRALayer, LowRank, Scale, layer_of, scale_at, wrap
from model import UNet3D, UserError

KINDS = ("spatial", "temporal")

# name: which linear layers of a transformer carry an adapter
TARGETS = {
    "blocks": ("transformer_blocks.",),  # attention and feed-forward (CustomTTT)
    "attention": ("transformer_blocks.0.attn1.", "transformer_blocks.0.attn2."),  # Customize-A-Video, stage 2
    "all": ("transformer_blocks.", "proj_in", "proj_out"),  # MotionDirector on AnimateDiff, spatial part
}


def layers_with(unet: UNet3D, kind: str) -> tuple[int, ...]:
    """The layers of the nine that have transformers of `kind`.

    Raises:
        UserError: `kind` is neither "spatial" nor "temporal".
    """
    if kind not in KINDS:
        raise UserError(f"unknown kind of adapter {kind!r}: one of {', '.join(KINDS)}")
    return tuple(i for i, layer in enumerate(unet.layers) if len(getattr(layer, kind)))


def adapter_linears(unet: UNet3D, spec: AdapterSpec) -> dict[str, nn.Linear]:
    """The linear layers that an adapter of this spec sits on, by their names in the UNet."""
    found = {}
    for index in spec.layers:
        prefix = f"layers.{index}.{spec.kind}."
        for name, module in unet.get_submodule(prefix[:-1]).named_modules():
            if isinstance(module, nn.Linear) and name.partition(".")[2].startswith(TARGETS[spec.targets]):
                found[prefix + name] = module
    return found


def add_adapter(
    unet: UNet3D,
    name: str,
    kind: str,
    layers: Iterable[int] | None = None,
    rank: int = 32,
    *,
    alpha: float | None = None,
    targets: str = "blocks",
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
) -> AdapterSpec:
    """Put a fresh adapter, switched off, on the linear layers of the chosen transformers.

    Args:
        unet: the network.
        name: what the adapter is called from here on; no dot in it.
        kind: "spatial" or "temporal".
        layers: layers of the nine; None is every layer that has this kind.
        rank: r, at least 1.
        alpha: numerator of the scale alpha / rank; None is the rank itself (scale 1).
        targets: "blocks" (attention and feed-forward), "attention", or "all" (with proj_in and proj_out).
        dropout: probability on the adapter's input while training, in [0, 1).
        generator: CPU generator of A's start; None is torch's global one.

    Returns:
        The adapter's spec, its layers written out.

    Raises:
        UserError: the name is taken, a layer does not exist or has no transformer of this kind, or a number is out of
            its range.
    """
    _check_free(unet, name)
    if targets not in TARGETS:
        raise UserError(f"unknown targets {targets!r}: one of {', '.join(TARGETS)}")
    if rank < 1 or not 0 <= dropout < 1:
        raise UserError(f"rank must be at least 1 and dropout within [0, 1): got {rank} and {dropout}")
    spec = AdapterSpec(kind, _chosen_layers(unet, kind, layers), rank, float(rank if alpha is None else alpha), targets)
    for path, linear in adapter_linears(unet, spec).items():
        _sit_on(unet, path, name, Adapter.fresh(linear, spec, dropout, generator))
    return spec


def place_adapter(network: nn.Module, name: str, weights: Mapping[str, LowRank]) -> None:
    """Put an adapter of given weights, switched off and frozen, on layers of any network.

    Args:
        network: the UNet, or the text encoder.
        name: what the adapter is called from here on; no dot in it.
        weights: by the layer's name in the network: an nn.Linear, or an nn.Conv2d; rank and alpha are each layer's own.
            They are kept in float32, where the layer is.

    Raises:
        UserError: the name is taken, a layer does not exist, or is of another shape; the network is left as it was.
    """
    _check_free(network, name)
    layers = dict(network.named_modules())
    made = {path: _made_for(layers.get(path), path, low) for path, low in weights.items()}
    for path, adapter in made.items():
        _sit_on(network, path, name, adapter)


def remove_adapter(network: nn.Module, name: str) -> None:
    """Take an adapter away; layers left without any become plain linear layers again.

    Raises:
        UserError: there is no such adapter, or adapters are merged.
    """
    _known(network, [name])
    if any(layer.original is not None for _, layer in _lora_layers(network)):
        raise UserError("adapters are merged into the weights: unmerge before removing one")
    for path, layer in _lora_layers(network):
        if name in layer.adapters:
            del layer.adapters[name]
            layer.scales.pop(name, None)
        if not len(layer.adapters):
            _replace(network, path, layer.unwrap())


def adapter_names(network: nn.Module) -> list[str]:
    """Names of all adapters in the network, in the order they were added."""
    return list(dict.fromkeys(name for _, layer in _lora_layers(network) for name in layer.adapters))


def adapter_spec(network: nn.Module, name: str) -> AdapterSpec:
    """The spec an adapter was added with.

    Raises:
        UserError: there is no such adapter, or its weights were given (`place_adapter`) and no spec describes them.
    """
    spec = next(iter(adapter_modules(network, name).values())).spec
    if spec is None:
        raise UserError(
            f"the adapter {name!r} comes from another tool's file, where each layer has a rank of its own: it can be "
            "switched and merged, and not be copied or saved as one of ours"
        )
    return spec


def adapter_modules(network: nn.Module, name: str) -> dict[str, Adapter]:
    """The adapter's modules by the name of the linear layer they sit on.

    Raises:
        UserError: there is no such adapter.
    """
    _known(network, [name])
    found = {path: layer.adapters[name] for path, layer in _lora_layers(network) if name in layer.adapters}
    return {path: module for path, module in found.items() if isinstance(module, Adapter)}


def adapter_layers(unet: nn.Module, name: str) -> tuple[int, ...]:
    """The layers of the nine in which the adapter has anything.

    Raises:
        UserError: there is no such adapter.
    """
    return tuple(sorted({i for path in adapter_modules(unet, name) if (i := layer_of(path)) is not None}))


def adapter_parameters(network: nn.Module, name: str) -> list[nn.Parameter]:
    """The adapter's parameters: A and B of every layer it sits on.

    Raises:
        UserError: there is no such adapter.
    """
    return [p for module in adapter_modules(network, name).values() for p in (module.A, module.B)]


@contextmanager
def adapters(network: nn.Module, scales: Mapping[str, Scale]) -> Iterator[None]:
    """Within the block exactly these adapters are on, each at its scale; afterwards what was on before.

    Raises:
        UserError: an unknown adapter.
    """
    before = [(layer, layer.scales) for _, layer in _lora_layers(network)]
    switch_adapters(network, scales)
    try:
        yield
    finally:
        for layer, old in before:
            layer.scales = {name: scale for name, scale in old.items() if name in layer.adapters}


def switch_adapters(network: nn.Module, scales: Mapping[str, Scale]) -> None:
    """Exactly these adapters are on from here on, each at its scale; a scale of 0 is off.

    Raises:
        UserError: an unknown adapter.
    """
    _known(network, scales)
    for path, layer in _lora_layers(network):
        own = {name: scale_at(path, scale) for name, scale in scales.items() if name in layer.adapters}
        layer.scales = {name: scale for name, scale in own.items() if scale}


def merge_adapters(network: nn.Module, scales: dict[str, float]) -> None:
    """Add adapters to the weights themselves, and switch all adapters off; the original weights are kept aside.

    Raises:
        UserError: an unknown adapter, or adapters are merged already.
    """
    _known(network, scales)
    if any(layer.original is not None for _, layer in _lora_layers(network)):
        raise UserError("adapters are merged already: unmerge first")
    for _, layer in _lora_layers(network):
        layer.merge(scales)
    switch_adapters(network, {})


def unmerge_adapters(network: nn.Module) -> None:
    """Bring back the weights from before `merge_adapters`, bit for bit; all adapters stay off."""
    for _, layer in _lora_layers(network):
        layer.unmerge()


def copy_adapter(unet: UNet3D, name: str, copy: str, dropout: float = 0.0) -> AdapterSpec:
    """Add an adapter `copy` with the spec and the present weights of `name` (test-time training's student).

    Raises:
        UserError: there is no `name`, or it has no spec (`adapter_spec`), or `copy` is taken.
    """
    spec = adapter_spec(unet, name)
    add_adapter(unet, copy, spec.kind, spec.layers, spec.rank, alpha=spec.alpha, targets=spec.targets, dropout=dropout)
    originals = adapter_modules(unet, name)
    for path, module in adapter_modules(unet, copy).items():
        module.load_state_dict(originals[path].state_dict())
    return spec


def _lora_layers(network: nn.Module) -> list[tuple[str, LoRALayer]]:
    return [(path, module) for path, module in network.named_modules() if isinstance(module, LoRALayer)]


def _check_free(network: nn.Module, name: str) -> None:
    if not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise UserError(f"an adapter's name must not be empty, contain a dot, or be a word of PyTorch's: {name!r}")
    if name in adapter_names(network):
        raise UserError(f"there is an adapter {name!r} already: remove it first, or choose another name")


def _made_for(layer: nn.Module | None, path: str, low: LowRank) -> Adapter:
    """The adapter for a layer, if the layer is there and its shape is the weights'."""
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        raise UserError(f"the network has no linear or convolutional layer {path}")
    out, *inner = layer.weight.shape
    wanted = ((low.rank, *inner), (out, low.rank, *[1] * (len(inner) - 1)))
    if (low.A.shape, low.B.shape) != wanted:
        shapes = f"{tuple(low.A.shape)} and {tuple(low.B.shape)}"
        raise UserError(f"{path} wants A and B of {wanted[0]} and {wanted[1]}, not {shapes}")
    # a copy, since a tensor fresh from a file changes with that file
    a, b = (t.detach().to(layer.weight.device, torch.float32, copy=True) for t in (low.A, low.B))
    given = LowRank(a, b, low.alpha)
    made = ConvAdapter(given, layer) if isinstance(layer, nn.Conv2d) else Adapter(given)
    return made.requires_grad_(False)


def _sit_on(network: nn.Module, path: str, name: str, adapter: Adapter) -> None:
    plain = network.get_submodule(path)
    layer = wrap(plain)
    if layer is not plain:
        _replace(network, path, layer)
    layer.adapters[name] = adapter.train(layer.training)


def _known(network: nn.Module, names: Iterable[str]) -> None:
    present = adapter_names(network)
    for name in names:
        if name not in present:
            raise UserError(f"there is no adapter {name!r}: the network has {', '.join(present) or 'none'}")


def _chosen_layers(unet: nn.Module, kind: str, layers: Iterable[int] | None) -> tuple[int, ...]:
    available = layers_with(unet, kind)
    what = {"spatial": "spatial transformer", "temporal": "motion module"}[kind]
    if not available:
        raise UserError(f"this network has no {what}: load a base with one (--motion_module)")
    if layers is None:
        return available
    chosen = tuple(sorted(set(layers)))
    wrong = [i for i in chosen if i not in available]
    if wrong or not chosen:
        named = f"layer {', '.join(map(str, wrong))} has no {what}" if wrong else "no layer was chosen"
        raise UserError(f"{named}: choose among layers {', '.join(map(str, available))}")
    return chosen


def _replace(network: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(network.get_submodule(parent), child, module)
