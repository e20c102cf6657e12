"""The base model, whole: read from whatever layout it comes in, every tensor accounted for."""

import hashlib
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from torch import Tensor
from transformers import CLIPTokenizer

from model import AutoencoderKL, NoiseSchedule, Recipe, TextEncoder, UNet3D, UserError
from weights.configs import motion_config, text_config, unet_config, vae_config
from weights.detect import FileKind, detect, detect_tensors, refuse
from weights.device import choose_device, default_dtype
from weights.download import how_to_get
from weights.files import read_checkpoint
from weights.keymaps import (
    IGNORED_IN_BASE,
    IGNORED_IN_MOTION,
    IGNORED_IN_TEXT,
    IGNORED_IN_VAE,
    MOTIONS,
    TEXTS,
    UNETS,
    VAES,
    Layout,
)
from weights.parts import Part, account, fill, read_part, take
from weights.recipe import read_recipe
from weights.tokenizer import WHERE_VOCABULARY_GOES, composed, read_tokenizer, tokenize, tokenizer_on_hub, unlearned

# A base's networks: folder in diffusers' layout, what is in it, how its tensors may be named, which may stay unused.
NETWORKS: tuple[tuple[str, str, tuple[Layout, ...], dict[str, str]], ...] = (
    ("unet", "UNet", UNETS, {}),
    ("vae", "VAE", VAES, IGNORED_IN_VAE),
    ("text_encoder", "text encoder", TEXTS, IGNORED_IN_TEXT),
)
MOTION = "motion_adapter"  # the folder of a base's own motion modules, as diffusers' AnimateDiffPipeline names it
TINY = Path(__file__).parent / "tiny"  # the base that is called "tiny"


@dataclass
class Base:
    """A base model with all that is needed to train on it and to sample from it; its weights are frozen.

    Args:
        unet: with the motion modules, or without (`unet.config.motion` is None).
        vae: its autoencoder.
        text: its text encoder.
        schedule: AnimateDiff's: betas linear from 0.00085 to 0.012. A Stable Diffusion folder's own scheduler says
            `scaled_linear`, which is left unread: with motion modules it shows as washed-out video.
        recipe: what this base is customised with unless a flag says otherwise.
        name: of its file or folder, or on the hub.
        fingerprints: of each of its networks (unet, motion_module, vae, text_encoder): they tell one's weights from
            another's, and are the same for copies in float32 and float16.
        source: what was named to load it from, by flag: base, motion_module, vae, tokenizer.
        tokenizer_folder: where CLIP's vocabulary is, None: on the hub.
        learned: tokens that prompts may hold beside CLIP's, and the numbers that each stands for: `learned_tokens`.
    """

    unet: UNet3D
    vae: AutoencoderKL
    text: TextEncoder
    schedule: NoiseSchedule
    recipe: Recipe
    name: str
    fingerprints: dict[str, str]
    source: dict[str, Any]
    tokenizer_folder: Path | None = None
    learned: Mapping[str, Sequence[int]] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where the UNet is."""
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the UNet's weights."""
        return self.unet.dtype

    @cached_property
    def tokenizer(self) -> CLIPTokenizer:
        """CLIP's tokenizer, read when first asked for.

        Raises:
            UserError: no vocabulary to be found, or one that does not belong to this text encoder.
        """
        folder = self.tokenizer_folder or tokenizer_on_hub()
        whose = f"the text encoder of {self.name}"
        return read_tokenizer(folder, self.text.config.vocab_size, whose, WHERE_VOCABULARY_GOES)

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> CLIP embeddings (b, n, d), n = 77 for CLIP, where the text encoder is and in its dtype.

        A longer prompt is cut, and a warning says what of it was lost.
        """
        with torch.no_grad():
            return self.text(self.tokens(prompts))

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> token numbers (b, n) as `text` takes them, cut like `embed`'s; what `learned` knows is in them."""
        length, its = self.text.config.max_position_embeddings, self.tokenizer
        rows = []
        for prompt in map(composed, prompts):
            found = tokenize(its, prompt, self.learned)
            if unknown := unlearned(its, prompt, self.learned):
                warnings.warn(
                    f"nothing was learned for {' and '.join(unknown)} in {prompt!r}, which is read letter by letter: "
                    "--embedding brings such words, or --absorbers where a motion is trained",
                    stacklevel=3,
                )
            if len(found) > length - 2:
                lost = prompt[found[length - 2][1] :]
                warnings.warn(f"the prompt is longer than {length - 2} tokens, and this is cut: {lost!r}", stacklevel=3)
            row = [its.bos_token_id, *(number for number, _ in found[: length - 2]), its.eos_token_id]
            rows.append(row + [its.pad_token_id] * (length - len(row)))
        return torch.tensor(rows, device=next(self.text.parameters()).device)


def load_base(
    path: str | Path = "tiny",
    motion_module: str | Path | None = None,
    vae: str | Path | None = None,
    tokenizer: str | Path | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Base:
    """Load a Stable Diffusion 1.5 checkpoint, with AnimateDiff's motion modules if they are given.

    Every key of the files is used or named in a rule that says why not (`keymaps.IGNORED_IN_...`), every parameter is
    filled, every shape is equal; weights are in memory once, are frozen, and must be finite.

    Args:
        path: a diffusers folder (whole or sharded, float32 or the fp16 variant), a one-file checkpoint (.safetensors,
            .ckpt), the name of either kind of repository in the hub's cache ("owner/name"), or "tiny": the base that
            comes with this program ("./tiny" is a folder of that name). A folder's `recipe.json` is its recipe.
        motion_module: AnimateDiff's file (v1, v2, v3), also as "owner/name/file" in the hub's cache, or a diffusers
            MotionAdapter folder; None: the folder `motion_adapter` inside the base's, as "tiny" has one, and without
            that an image-only UNet.
        vae: a file or folder with another autoencoder than the base's own.
        tokenizer: a folder with CLIP's vocabulary; None: the base's own, else the hub's.
        device: where the weights go; None: to CUDA if there is one.
        dtype: what they are cast to; None: bfloat16 on CUDA (float16 on cards without), float32 on the CPU. The
            autoencoder is float32 always: half precision would show in the pictures.

    Raises:
        UserError: a file is missing, damaged, of the wrong kind, or does not fit: the message says which, and more.
    """
    device = choose_device(device)
    dtype = default_dtype(device) if dtype is None else dtype
    source = _tiny() if str(path) == "tiny" else _resolve(path)
    folder = _tokenizer_folder(source, tokenizer)
    recipe = read_recipe(source)
    parts = _read_base(source)
    if vae is not None:
        parts["vae"] = read_part(_resolve(vae), "the VAE", ("VAE",), VAES, IGNORED_IN_VAE)
    for name, what, _, _ in NETWORKS:
        if name not in parts:
            remedy = "name one with --vae" if name == "vae" else "take another checkpoint, or get the rest of this one"
            raise UserError(f"{source} has no {what}: {remedy}")
    own = source / MOTION
    motion_source = _resolve(motion_module) if motion_module is not None else own if own.is_dir() else None
    motion = None
    if motion_source is not None:
        kinds = ("motion module", "motion adapter")
        motion = read_part(motion_source, "the motion module", kinds, MOTIONS, IGNORED_IN_MOTION)

    modules = None if motion is None else motion_config(motion)
    with torch.device("meta"):
        unet = UNet3D(unet_config(parts["unet"], modules))
        autoencoder = AutoencoderKL(vae_config(parts["vae"]))
        text = TextEncoder(text_config(parts["text_encoder"]))
    _check_widths(source, unet, autoencoder, text)
    networks = {**parts, "motion_module": motion} if motion is not None else parts
    fingerprints = {part: _fingerprint(read.tensors) for part, read in networks.items()}
    fill(unet, parts["unet"], device, dtype, covers=lambda name: ".temporal." not in name)
    if motion is not None:
        fill(unet, motion, device, dtype, covers=lambda name: ".temporal." in name)
    fill(autoencoder, parts["vae"], device, torch.float32)
    fill(text.eval().clip, parts["text_encoder"], device, dtype)
    # the one buffer that files need not hold was made on the meta device
    text.clip.embeddings.position_ids = torch.arange(text.config.max_position_embeddings, device=device)[None]

    name = source.resolve().name if Path(path).expanduser() == source else str(path)
    given = {"base": path, "motion_module": motion_module, "vae": vae, "tokenizer": tokenizer}
    source_of = {flag: None if value is None else str(value) for flag, value in given.items()}
    return Base(unet, autoencoder, text, NoiseSchedule(), recipe, name, fingerprints, source_of, folder)


def _tiny() -> Path:
    if not TINY.is_dir():
        raise UserError(
            f"this installation lacks the tiny base ({TINY} is not there): install customttt again, or name a Stable "
            "Diffusion 1.5 checkpoint (a diffusers folder, a .safetensors or a .ckpt file)"
        )
    return TINY


def _resolve(path: str | Path) -> Path:
    """A path as it is, or what a hub name ("owner/name", "owner/name/file") stands for in the hub's cache."""
    here = Path(path).expanduser()
    if here.exists():
        return here
    named = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:/([\w.-]+))?", str(path))
    if named is None:
        raise UserError(f"{path} does not exist")
    repo, file = named.groups()
    try:
        if file is not None:
            return Path(hf_hub_download(repo, file, local_files_only=True))
        return Path(snapshot_download(repo, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError) as error:
        partial = getattr(error, "snapshot_path", None)  # where a part of the repository was fetched: it may be enough
        if partial is not None:
            return Path(partial)
        raise UserError(
            f"{path} is no file or folder here, and no model of that name is in the hub's cache. If it is on the hub, "
            f"get it with: {how_to_get(repo, file)}"
        ) from error


def _read_base(source: Path) -> dict[str, Part]:
    """The base's networks by the name of their folder, without those that it does not have.

    A one-file checkpoint's keys are shared out among them; what is left falls to the UNet's account.
    """
    if source.is_dir():
        _expect("diffusers folder", source, detect(source))
        present = [row for row in NETWORKS if (source / row[0]).is_dir()]
        return {
            name: read_part(source / name, f"the base's {what}", (what,), layouts, ignored)
            for name, what, layouts, ignored in present
        }
    tensors = read_checkpoint(source)
    _expect("one-file checkpoint", source, detect_tensors(tensors))
    parts = {name: take(source, tensors, layouts) for name, _, layouts, _ in NETWORKS}
    account(parts["unet"], tensors, IGNORED_IN_BASE)
    return {name: part for name, part in parts.items() if part.tensors}


def _expect(kind: str, source: Path, found: FileKind) -> None:
    if found.kind != kind or found.family not in ("", "sd15") or found.version:
        refuse(source, found, "the base")


def _check_widths(source: Path, unet: UNet3D, vae: AutoencoderKL, text: TextEncoder) -> None:
    """The three networks must fit each other, not only their own files."""
    channels = (unet.config.in_channels, unet.config.out_channels)
    if channels != (vae.config.latent_channels,) * 2:
        raise UserError(
            f"{source}: the UNet takes {channels[0]} channels and gives {channels[1]}, and the VAE's latents have "
            f"{vae.config.latent_channels}: they do not belong together"
        )
    if unet.config.cross_attention_dim != text.config.hidden_size:
        raise UserError(
            f"{source}: the UNet wants text of width {unet.config.cross_attention_dim}, and the text encoder gives "
            f"{text.config.hidden_size}: they do not belong together"
        )


def _fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Of the beginning of every tensor, rounded to float16: copies of one network in both precisions agree."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].flatten()[:1024].half().numpy().tobytes())
    return digest.hexdigest()[:16]


def _tokenizer_folder(source: Path, tokenizer: str | Path | None) -> Path | None:
    """The folder that was asked for, or the base's own if it has one."""
    folder = source / "tokenizer" if tokenizer is None else Path(tokenizer).expanduser()
    if tokenizer is not None and not folder.is_dir():
        raise UserError(f"{tokenizer} was given as the tokenizer, and is no folder. {WHERE_VOCABULARY_GOES}")
    return folder if folder.is_dir() else None
