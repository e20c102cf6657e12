"""Absorbers at work: while a motion is trained they hold the clip's looks, frozen, and afterwards they are gone."""

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lora import adapter_modules, adapter_names, adapters, remove_adapter
from model import UNet3D, UserError
from sampling import encode
from train.folder import TOKEN_FILE
from weights import Base, load_lora, read_json, sha256, split_strength
from weights.detect import detect
from weights.embeddings import learned_tokens, read_embedding
from weights.keymaps import UNETS
from weights.lora import FILE_NAME
from weights.parts import check, read_weights, take
from weights.tokenizer import contains

CHECKPOINTS = ("one-file checkpoint", "UNet", "diffusers folder")


@dataclass(frozen=True)
class Absorber:
    """One absorber, as `--absorbers` names it: a run folder or any file that loads.

    Args:
        lora: a LoRA file, at `strength`.
        embedding: a learned token.
        checkpoint: a file or folder whose UNet takes the place of the base's (DreamBooth).
        strength: of the LoRA.
        run: the folder of `train.absorber` that it comes from.
    """

    lora: Path | None = None
    embedding: Path | None = None
    checkpoint: Path | None = None
    strength: float = 1.0
    run: Path | None = None

    def files(self) -> list[Path]:
        """All files that it consists of."""
        found = [path for path in (self.lora, self.embedding) if path is not None]
        if self.checkpoint is not None:
            inside = self.checkpoint.rglob("*.safetensors") if self.checkpoint.is_dir() else [self.checkpoint]
            found += sorted(inside)
        return found


def find_absorber(argument: str) -> Absorber:
    """What an argument of `--absorbers` names: a path, with a strength behind a colon if not 1.

    Raises:
        UserError: nothing there, an unfinished run, or a file that cannot absorb looks.
    """
    name, strength = split_strength(argument)
    path = Path(name)
    if not path.exists():
        raise UserError(
            f"{path} does not exist: an absorber's run folder, a LoRA, an embedding or a checkpoint was expected"
        )
    if path.is_dir() and (path / "settings.json").is_file():
        kind = read_json(path / "settings.json").get("kind")
        lora = path / FILE_NAME if kind != "token" else None
        embedding = path / TOKEN_FILE if kind in ("token", "dual") else None
        for file in (lora, embedding):
            if file is not None and not file.is_file():
                raise UserError(f"{path} has no {file.name}: the run in it is not finished: start it again")
        return Absorber(lora, embedding, strength=strength, run=path if kind is not None else None)
    kind = detect(path).kind
    if kind == "textual inversion":
        return Absorber(embedding=path)
    if kind in CHECKPOINTS:
        return Absorber(checkpoint=path)
    return Absorber(lora=path, strength=strength)


@dataclass(frozen=True)
class Looks:
    """What an absorber is once it is loaded: its adapters in UNet and text encoder, and the token of a learned word."""

    scales: Mapping[str, float]
    token: str | None = None


@contextmanager
def absorbed(base: Base, absorbers: Sequence[Absorber]) -> Iterator[list[Looks]]:
    """Within the block the absorbers are in the base, their LoRAs switched off; afterwards it is as it was.

    Args:
        base: its UNet, and its text encoder where a LoRA has a part for it, get the adapters; all is frozen.
        absorbers: with one checkpoint at most.

    Raises:
        UserError: a file that does not load, a LoRA that changes motion modules, or several checkpoints.
    """
    checkpoints = [its.checkpoint for its in absorbers if its.checkpoint is not None]
    if len(checkpoints) > 1:
        raise UserError(f"{checkpoints[1]}: the UNet is that of {checkpoints[0]} already; give one checkpoint")
    embeddings = {i: read_embedding(its.embedding) for i, its in enumerate(absorbers) if its.embedding is not None}
    with ExitStack() as stack:
        for checkpoint in checkpoints:
            stack.enter_context(unet_of(base.unet, checkpoint))
        added = [stack.enter_context(frozen_lora(base, its.lora)) if its.lora else [] for its in absorbers]
        stack.enter_context(learned_tokens(base, list(embeddings.values())))
        yield [
            Looks(dict.fromkeys(names, its.strength), embeddings[i].token if i in embeddings else None)
            for i, (names, its) in enumerate(zip(added, absorbers, strict=True))
        ]


@contextmanager
def frozen_lora(base: Base, path: Path) -> Iterator[list[str]]:
    """Within the block a LoRA of looks is in the networks, switched off and without gradients; gives its adapters."""
    unet, text = base.unet, base.text.clip
    names = list(load_lora(unet, path, fingerprints=base.fingerprints, text=text))
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


def encode_with(base: Base, looks: Sequence[Looks], prompt: str) -> Tensor:
    """Embeddings (1, n, d) of the prompt, its learned tokens known, the LoRAs' parts for the text encoder on.

    Raises:
        UserError: a token that the prompt does not contain, and which would so absorb nothing.
    """
    for its in looks:
        if its.token is not None and not contains(prompt, its.token):
            raise UserError(
                f"the absorber's token {its.token} is not in the prompt {prompt!r}: write it where the looks belong, "
                "as in the absorber's own prompt"
            )
    with switched_on(base.text.clip, {name: scale for its in looks for name, scale in its.scales.items()}):
        return encode(base, [prompt])


def plain(prompt: str, tokens: Sequence[str]) -> str:
    """The prompt without the absorbers' tokens, which nothing knows once they are dropped."""
    for token in tokens:
        prompt = re.sub(re.escape(token), "", prompt, flags=re.IGNORECASE)
    return " ".join(prompt.split())


def warn_of_strangers(
    arguments: Sequence[str], absorbers: Sequence[Absorber], videos: Sequence[Mapping[str, Path]]
) -> None:
    """Warn of absorbers that were trained on another clip than the one they serve, as their run folders tell.

    Args:
        arguments: as `--absorbers` names them.
        absorbers: what they are.
        videos: the files of each clip; with several, each has the absorber in its place.
    """
    contents = [{sha256(file) for file in files.values()} for files in videos]
    for i, (argument, its) in enumerate(zip(arguments, absorbers, strict=True)):
        if its.run is None:
            continue
        trained_on = set(read_json(its.run / "inputs.json").get("contents", {}).values())
        if not trained_on & (contents[i] if len(videos) > 1 else contents[0]):
            warnings.warn(
                f"{argument} was trained on another clip: it may leave this one's looks to the motion LoRA",
                stacklevel=3,
            )


@contextmanager
def unet_of(unet: UNet3D, source: Path) -> Iterator[None]:
    """Within the block the spatial weights are those of a checkpoint (DreamBooth); afterwards the base's own again.

    Raises:
        UserError: the checkpoint is of another architecture, damaged, or has no UNet.
    """
    folder = source / "unet" if (source / "unet").is_dir() else source
    part = take(source, read_weights(folder, "an absorber"), UNETS)
    its = {name: parameter for name, parameter in unet.named_parameters() if ".temporal." not in name}
    check(part, {name: tuple(parameter.shape) for name, parameter in its.items()})
    own = {name: parameter.data for name, parameter in its.items()}
    try:
        for name, parameter in its.items():
            new = part.tensors.pop(name).reshape(parameter.shape).to(parameter.device, parameter.dtype)
            if not torch.isfinite(new).all():
                raise UserError(f"{source}: {part.layout.from_ours(name) or name} holds numbers that are not finite")
            parameter.data = new
        yield
    finally:
        for name, parameter in its.items():
            parameter.data = own[name]
