"""Absorbers at work: while a motion is trained they hold the clip's looks, frozen, and afterwards they are gone."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lora import adapter_modules, adapter_names, adapters, remove_adapter
from model import UNet3D, UserError
from sampling import encode
from train.absorber_files import Absorber, unet_in
from weights import Base, Embedding, learned_tokens, load_lora, read_embedding
from weights.keymaps import UNETS
from weights.lora import say_what_adds
from weights.parts import fill, read_weights, take
from weights.tokenizer import contains, without


@dataclass(frozen=True)
class Looks:
    """What an absorber is once it is loaded.

    Args:
        name: as it was given.
        scales: its adapters in UNet and text encoder, and how strongly they are on.
        embedding: its learned token.
        weights: of a checkpoint's UNet, by our names; empty for the base's own.
    """

    name: str
    scales: Mapping[str, float]
    embedding: Embedding | None = None
    weights: Mapping[str, Tensor] = field(default_factory=dict)


@contextmanager
def absorbed(
    base: Base, sides: Sequence[Sequence[Absorber]], allow_partial: bool = False
) -> Iterator[list[list[Looks]]]:
    """Within the block the absorbers are loaded and frozen, and none is on; afterwards the base is as it was.

    Args:
        base: its UNet, and its text encoder where a LoRA has a part for it, get the adapters.
        sides: the absorbers of each video.
        allow_partial: leave out what of a LoRA has no layer here.

    Raises:
        UserError: a file that does not load, or a LoRA that changes motion modules.
    """
    with ExitStack() as stack:
        loaded = [[_load(base, its, stack, allow_partial) for its in side] for side in sides]
        for side in loaded:
            say_what_adds((base.unet, base.text.clip), {its.name: its.scales for its in side})
        yield loaded


def _load(base: Base, its: Absorber, stack: ExitStack, allow_partial: bool) -> Looks:
    embedding = read_embedding(its.embedding, its.token) if its.embedding is not None else None
    weights = spatial_weights(base.unet, its.checkpoint) if its.checkpoint is not None else {}
    added = stack.enter_context(frozen_lora(base, its.lora, allow_partial)) if its.lora is not None else []
    return Looks(its.name, dict.fromkeys(added, its.strength), embedding, weights)


@contextmanager
def frozen_lora(base: Base, path: Path, allow_partial: bool = False) -> Iterator[list[str]]:
    """Within the block a LoRA of looks is in the networks, switched off and without gradients; gives its adapters."""
    unet, text = base.unet, base.text.clip
    names = list(load_lora(unet, path, fingerprints=base.fingerprints, text=text, allow_partial=allow_partial))
    try:
        for name in names:
            if any(".temporal." in module for module in present(unet, name)):
                raise UserError(f"{path} changes motion modules: it would absorb the motion; give one of looks alone")
            for network in (unet, text):
                for adapter in present(network, name).values():
                    adapter.requires_grad_(False)
        yield names
    finally:
        for network in (unet, text):
            for name in set(names) & set(adapter_names(network)):
                remove_adapter(network, name)


def present(network: nn.Module, name: str) -> Mapping[str, nn.Module]:
    """The modules of an adapter, none where the network does not have it."""
    return adapter_modules(network, name) if name in adapter_names(network) else {}


@contextmanager
def switched_on(network: nn.Module, scales: Mapping[str, float]) -> Iterator[None]:
    """Within the block exactly those of the adapters that the network has are on."""
    known = adapter_names(network)
    with adapters(network, {name: scale for name, scale in scales.items() if name in known}):
        yield


@contextmanager
def at_work(unet: UNet3D, side: Sequence[Looks], trained: Mapping[str, float]) -> Iterator[None]:
    """Within the block exactly the absorbers of one video are on, and the adapters that are trained behind them."""
    own = {name: parameter.data for its in side for name, parameter in unet.named_parameters() if name in its.weights}
    on = {name: scale for its in side for name, scale in its.scales.items()}
    try:
        for its in side:
            _take(unet, its.weights)
        with switched_on(unet, {**on, **trained}):
            yield
    finally:
        _take(unet, own)


def _take(unet: UNet3D, weights: Mapping[str, Tensor]) -> None:
    for name, tensor in weights.items():
        unet.get_parameter(name).data = tensor


def encode_with(base: Base, side: Sequence[Looks], prompt: str) -> Tensor:
    """Embeddings (1, n, d) of a video's prompt: its tokens known, its LoRAs' parts for the text encoder on.

    Raises:
        UserError: a token that does not fit the base, or that the prompt lacks, so that it would absorb nothing.
    """
    embeddings = [its.embedding for its in side if its.embedding is not None]
    for token in (its.token for its in embeddings):
        if not contains(prompt, token):
            raise UserError(
                f"the absorber's token {token} is not in the prompt {prompt!r}: write it where the looks belong, as in "
                "the absorber's own prompt"
            )
    on = {name: scale for its in side for name, scale in its.scales.items()}
    with learned_tokens(base, embeddings), switched_on(base.text.clip, on):
        return encode(base, [prompt])


def plain(prompt: str, side: Sequence[Looks]) -> str:
    """The prompt without the absorbers' tokens, which nothing knows once they are dropped."""
    for its in side:
        if its.embedding is not None:
            prompt = without(prompt, its.embedding.token)
    return prompt


def spatial_weights(unet: UNet3D, source: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint's UNet by our names, where the UNet is and in its dtype.

    Raises:
        UserError: the checkpoint is of another architecture, damaged, or has no UNet.
    """
    part = take(source, read_weights(unet_in(source), "an absorber"), UNETS)
    with torch.device("meta"):
        its = UNet3D(replace(unet.config, motion=None))
    fill(its, part, unet.device, unet.dtype)
    return {name: parameter.data for name, parameter in its.named_parameters()}
