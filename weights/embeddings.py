"""Textual-inversion embeddings: vectors for new words of a prompt, from files of all the tools that train them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from model import UserError
from weights.detect import TOKEN_FILE, detect, refuse
from weights.files import Header, atomic_write, read_checkpoint, read_header
from weights.load import Base
from weights.tokenizer import contains

KIND = "textual inversion"  # what `detect` calls such files
BARE = "tensor"  # what `read_checkpoint` calls a tensor that is all of a file
A1111 = "string_to_param."
NAMELESS = ("*", "emb_params", "clip_l", "clip_g")  # names of entries that do not say the token
OTHER_FAMILIES = ("sd2", "sdxl")
MODEL_OF_WIDTH = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2", 1280: "SDXL's second text encoder"}


@dataclass(frozen=True, eq=False)
class Embedding:
    """A learned token.

    Args:
        token: how prompts write it.
        vectors: (n, d) float32: the rows of the text encoder's embedding table that it stands for.
    """

    token: str
    vectors: Tensor

    def __post_init__(self) -> None:
        if not self.token.strip():
            raise UserError("a learned token must not be empty")


def read_embedding(path: str | Path, token: str | None = None) -> Embedding:
    """Read a textual-inversion file: A1111's, diffusers' learned_embeds, `emb_params`, or a bare tensor.

    Args:
        path: the file, or the run folder of an absorber with a token.
        token: how prompts write it; None: as the file says, else the file's name without its suffix.

    Raises:
        UserError: no such file, a file of another kind, for another model, or damaged, or without a token.
    """
    path = embedding_path(path)
    if path.is_dir():
        raise UserError(
            f"{path} is a folder without a learned word ({TOKEN_FILE}): give a run's that has one, or a file"
        )
    if not path.is_file():
        raise UserError(f"{path} is no file: a textual-inversion file was expected (its token is :TOKEN behind it)")
    found, header = detect(path), read_header(path)
    short = found.kind == "unknown" and not any("." in name for name in header.tensors)
    if (found.kind != KIND and not short) or found.family in OTHER_FAMILIES:
        refuse(path, found, "an embedding")
    entries = vectors_in(read_checkpoint(path))
    if len(entries) != 1:
        some = ", ".join(map(repr, list(entries)[:3]))
        raise UserError(f"{path} holds {len(entries)} entries ({some}), and one was expected, the vectors of one token")
    if token is None:
        token = token_in(header, path)
    if token is None:
        raise UserError(f"{path} holds vectors, and no token for them: write one behind a colon, {path}:TOKEN")
    vectors = next(iter(entries.values()))
    return _checked(path, token, vectors[None] if vectors.ndim == 1 else vectors)


def embedding_path(path: str | Path) -> Path:
    """The file that a path names: a run folder's, or itself."""
    inside = Path(path) / TOKEN_FILE
    return inside if inside.is_file() else Path(path)


def read_embeddings(arguments: Sequence[str]) -> list[Embedding]:
    """The files that `--embedding` names, each with its token behind a colon if it shall be another than its own.

    Raises:
        UserError: as `read_embedding`, or the same token twice.
    """
    found: dict[str, str] = {}
    embeddings = []
    for argument in arguments:
        embedding = read_embedding(*split_token(argument))
        if known := found.get(embedding.token.lower()):
            raise UserError(
                f"{known} and {argument} have the same token, {embedding.token!r}: write another one behind a colon"
            )
        found[embedding.token.lower()] = argument
        embeddings.append(embedding)
    return embeddings


def split_token(argument: str) -> tuple[str, str | None]:
    """ "cat.pt:<cat>" -> ("cat.pt", "<cat>"); the file is what exists, so that colons may be in both."""
    ends = [i for i, letter in enumerate(argument) if letter == ":"]
    for end in [] if Path(argument).exists() else reversed(ends):
        if embedding_path(argument[:end]).is_file():
            return argument[:end], argument[end + 1 :]
    return argument, None


def save_embedding(path: str | Path, embedding: Embedding, metadata: Mapping[str, str] | None = None) -> None:
    """Write a file as diffusers' learned_embeds.safetensors, atomically: one entry, the token's, (n, d) in float32.

    Raises:
        UserError: a token or vectors that could not be read back, or a system that refuses.
    """
    checked = _checked(path, embedding.token, embedding.vectors)
    with atomic_write(path) as temporary:
        save_file({checked.token: checked.vectors}, temporary, metadata=dict(metadata or {}))
        try:
            understood = detect(temporary).kind == KIND and token_in(read_header(temporary), temporary) == checked.token
        except UserError:  # a name that safetensors has another use for
            understood = False
        if not understood:
            raise UserError(f"{path}: not written, since {checked.token!r} would not be read as a token: take another")


@contextmanager
def learned_tokens(base: Base, embeddings: Sequence[Embedding]) -> Iterator[None]:
    """Within the block the base's prompts may hold the tokens; afterwards it is as it was.

    A token is found as a word of its own, in capitals or not, and stands for its n vectors: as in diffusers, where the
    further ones are tokens called name_1 to name_{n-1}. Neither the tokenizer nor the embedding table is changed. To
    train a token, let `vectors` be an `nn.Parameter`, and call `base.text(base.tokens(prompts))`.

    Raises:
        UserError: a token that CLIP knows, or that is there already, or vectors of another width than the encoder's.
    """
    before, learned = base.learned, dict(base.learned)
    try:
        with ExitStack() as stack:
            for embedding in embeddings:
                _check_fit(base, embedding, learned)
                learned[embedding.token] = stack.enter_context(base.text.learned(embedding.vectors))
            base.learned = learned
            yield
    finally:
        base.learned = before


def is_known(base: Base, token: str) -> bool:
    """Whether CLIP has a token of this name itself, which a learned one would take the place of."""
    return len(base.tokenizer(token, add_special_tokens=False)["input_ids"]) < 2


def unused_tokens(embeddings: Sequence[Embedding], prompts: Sequence[str]) -> list[str]:
    """The tokens that no prompt contains."""
    return [its.token for its in embeddings if not any(contains(prompt, its.token) for prompt in prompts)]


def vectors_in(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Of a file's tensors (or of their shapes) those that are vectors: A1111's files may hold token numbers too."""
    return {n: t for n, t in tensors.items() if n.startswith(A1111)} or dict(tensors)


def token_in(header: Header, path: Path) -> str | None:
    """The token of a textual-inversion file: as it says, else its file's name; None for a bare tensor."""
    name = next(iter(vectors_in(header.tensors)))
    if name == BARE:
        return None
    if name.startswith(A1111):
        name = header.metadata.get("name") or name.removeprefix(A1111)
    return path.stem if name in NAMELESS else name


def _checked(path: str | Path, token: str, vectors: Tensor) -> Embedding:
    token = " ".join(token.split())
    if not token:
        raise UserError(f"{path}: the token is empty; write one behind a colon, {path}:TOKEN")
    if vectors.ndim != 2 or not vectors.numel() or not vectors.is_floating_point():
        raise UserError(
            f"{path}: the vectors of {token!r} must be numbers of shape (n, width), and are "
            f"{tuple(vectors.shape)} of {str(vectors.dtype).removeprefix('torch.')}"
        )
    vectors = vectors.detach().to("cpu", torch.float32, copy=True).contiguous()
    if not vectors.isfinite().all():
        raise UserError(f"{path}: the vectors of {token!r} hold numbers that are not finite: make or get it again")
    return Embedding(token, vectors)


def _check_fit(base: Base, embedding: Embedding, learned: Mapping[str, Sequence[int]]) -> None:
    token, given, wanted = embedding.token, embedding.vectors.shape[-1], base.text.config.hidden_size
    if given != wanted:
        whose = f" ({MODEL_OF_WIDTH[given]})" if given in MODEL_OF_WIDTH else ""
        raise UserError(
            f"the vectors of {token!r} are {given} wide{whose}, and the text encoder of {base.name} takes {wanted}: "
            "the embedding was trained for another model"
        )
    if token.lower() in map(str.lower, learned):
        raise UserError(f"the token {token!r} is given twice: write another one behind the file and a colon")
    if is_known(base, token):
        raise UserError(
            f"the token {token!r} is a word of CLIP's own, which would be lost: write another one behind the file and "
            "a colon, such as FILE:<my-word>"
        )
