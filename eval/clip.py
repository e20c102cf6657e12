"""The papers' CLIP scores: whether a clip shows what its prompt says, and its photos' subject, and holds together."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from eval.clip_images import PROCESSORS, ImageNumbers, check_frames, preprocess, read_numbers
from model import UserError
from weights.load import TINY
from weights.parts import read_config, read_weights
from weights.tokenizer import read_tokenizer

__all__ = ["CLIPScorer", "clip_i", "clip_t", "load_clip", "preprocess", "temporal_consistency"]

WHERE_CLIP_IS = (
    "Get one with `customttt download clip-b32` (openai/clip-vit-base-patch32: config.json, model.safetensors or "
    "pytorch_model.bin, vocab.json, merges.txt, preprocessor_config.json) and name its folder with --clip"
)
POSITIONS = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")  # in old files: counts

# the tiny base's CLIP was trained on frames in [-1, 1] as they are, and its folder does not say so
TINY_NUMBERS = ImageNumbers(resize=64, crop=(64, 64), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


class CLIPScorer:
    """A CLIP with its tokenizer and its image processor's numbers: frames and prompts to features.

    Args:
        model: in float32, frozen, and where it is to run.
        tokenizer: its own.
        numbers: its image processor's.
        name: printed beside each figure: those of different CLIPs are not comparable.
    """

    def __init__(self, model: CLIPModel, tokenizer: CLIPTokenizer, numbers: ImageNumbers, name: str) -> None:
        self.model, self.tokenizer, self.numbers, self.name = model, tokenizer, numbers, name

    @torch.no_grad()
    def images(self, frames: Tensor, batch_size: int = 64) -> Tensor:
        """Features of length 1 (n, d), float32 on the CPU, of frames (n, 3, h, w) in [-1, 1], n at least 1.

        Raises:
            UserError: no frames, another shape, numbers that are not finite, or images of a size that this CLIP does
                not see.
        """
        side, features = self.model.config.vision_config.image_size, []
        check_frames(frames)
        for part in frames.split(batch_size):
            pixels = preprocess(part.to(self.model.device), self.numbers)
            if pixels.shape[-2:] != (side, side):
                raise UserError(
                    f"{self.name} sees images of {side}x{side} pixels, and its image processor makes "
                    f"{pixels.shape[-1]}x{pixels.shape[-2]} of these frames: {PROCESSORS[0]} is not this CLIP's"
                )
            seen = self.model.vision_model(pixel_values=pixels).pooler_output
            features.append(F.normalize(self.model.visual_projection(seen), dim=-1).cpu())
        return torch.cat(features)

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Features of length 1 (n, d), float32 on the CPU, of n prompts, n at least 1.

        A prompt longer than CLIP's window is cut, and a warning says which and what of it was lost.

        Raises:
            UserError: no prompts.
        """
        if not prompts:
            raise UserError("there are no prompts to score")
        length = self.model.config.text_config.max_position_embeddings
        whole = self.tokenizer(list(prompts), verbose=False, return_offsets_mapping=True)
        for prompt, offsets in zip(prompts, whole["offset_mapping"], strict=True):
            if len(offsets) > length:
                lost = prompt[offsets[length - 1][0] :]
                warnings.warn(
                    f"{self.name} reads {length - 2} tokens of a prompt, and {prompt!r} is longer: the score is blind "
                    f"to {lost!r}",
                    stacklevel=2,
                )
        tokens = self.tokenizer(list(prompts), padding=True, truncation=True, max_length=length, return_tensors="pt")
        read = self.model.text_model(**tokens.to(self.model.device)).pooler_output
        return F.normalize(self.model.text_projection(read), dim=-1).cpu()


def load_clip(folder: str | Path | None = None, device: str = "cpu") -> CLIPScorer:
    """The CLIP in a folder as the hub has them, any transformers CLIPModel; nothing is downloaded, no pickle is run.

    The papers' tables fit ViT-B/32 (openai/clip-vit-base-patch32); LOVEU-TGVE takes ViT-L/14.

    Args:
        folder: with config.json, weights, the tokenizer, and preprocessor_config.json (without one: OpenAI's numbers,
            at the model's image size). None: the tiny base's CLIP, which knows the rendered world alone.
        device: where it runs, in float32.

    Raises:
        UserError: a file that is missing, damaged or not a CLIP's.
    """
    path = TINY / "clip" if folder is None else Path(folder).expanduser()
    tiny = path.resolve() == (TINY / "clip").resolve()
    if not path.is_dir() or read_config(path).get("model_type") != "clip":
        missing = "it is not a folder" if not path.is_dir() else "no config.json says that it is one"
        raise UserError(f"{path} holds no CLIP: {missing}. {WHERE_CLIP_IS}")
    model = _read_model(path)
    home = TINY / "tokenizer" if tiny else path
    tokenizer = read_tokenizer(home, model.config.text_config.vocab_size, "its CLIP", WHERE_CLIP_IS)
    numbers = TINY_NUMBERS if tiny else read_numbers(path, model.config.vision_config.image_size)
    return CLIPScorer(model.to(device), tokenizer, numbers, "tiny CLIP" if tiny else _name(path))


def clip_t(frames: Tensor, text: Tensor) -> float:
    """CLIP-T of one clip, in [-1, 1]: the mean over frames (f, d) of the cosine with the prompt (d,).

    CustomTTT's tables, by DreamVideo's protocol, whose cosine is with the mean of unit features, which is the same
    number. LOVEU-TGVE prints 100 times it. Over several clips the tables give the mean of the clips' scores.

    Raises:
        UserError: no frames.
    """
    return _cosines(frames, text[None]).mean().item()


def clip_i(frames: Tensor, references: Tensor) -> float:
    """CLIP-I of one clip, in [-1, 1]: the mean cosine of all pairs of a frame (f, d) and a photo (m, d).

    CustomTTT's tables, by DreamVideo's protocol.

    Raises:
        UserError: no frames or no photos.
    """
    return _cosines(frames, references).mean().item()


def temporal_consistency(frames: Tensor, pairs: str = "consecutive") -> float:
    """How alike the frames of one clip (f, d) are, in [-1, 1]: the mean cosine of pairs of them.

    Args:
        frames: two or more.
        pairs: "consecutive": each frame with the next, f - 1 pairs: DreamVideo's protocol, and our reading of
            CustomTTT's table, whose .97 to .98 fit it. "all": each frame with every other, f (f - 1) pairs:
            LOVEU-TGVE's, which falls as things move.

    Raises:
        UserError: fewer than two frames, or other pairs.
    """
    if len(frames) < 2:
        raise UserError(f"temporal consistency compares frames, and a clip of {len(frames)} has none to compare")
    cosines = _cosines(frames, frames)
    if pairs == "consecutive":
        return cosines.diagonal(1).mean().item()
    if pairs == "all":
        return cosines[~torch.eye(len(frames), dtype=torch.bool, device=cosines.device)].mean().item()
    raise UserError(f"pairs of frames are 'consecutive' or 'all', not {pairs!r}")


def _cosines(features: Tensor, others: Tensor) -> Tensor:
    """(n, d) and (m, d) -> (n, m)."""
    if not len(features) or not len(others):
        raise UserError("there is nothing to score: no frames, or nothing to compare them with")
    return F.normalize(features, dim=-1) @ F.normalize(others, dim=-1).T


def _name(path: Path) -> str:
    """The folder's name; in the hub's cache, where that is a checksum, the repository's."""
    whole = path.resolve()
    in_cache = whole.parent.name == "snapshots" and whole.parent.parent.name.startswith("models--")
    return whole.parent.parent.name.removeprefix("models--").replace("--", "/") if in_cache else whole.name


def _read_model(path: Path) -> CLIPModel:
    """transformers' own loading would fill in what is missing with random numbers, and score with them."""
    tensors = {name: tensor.float() for name, tensor in read_weights(path, "a CLIP").items() if name not in POSITIONS}
    try:
        config = CLIPConfig.from_dict(dict(read_config(path)))
        with torch.device("meta"):
            model = CLIPModel(config)
        model.load_state_dict(tensors, assign=True)
        broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    except Exception as error:  # whatever a config of nonsense does to transformers
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{path} holds no CLIP: config.json and weights disagree ({reason}). {WHERE_CLIP_IS}"
        ) from error
    if broken:
        raise UserError(f"{path} is damaged: {broken[0]} holds numbers that are not finite (NaN or infinity)")
    for embeddings in (model.text_model.embeddings, model.vision_model.embeddings):
        # the one buffer that files need not hold was made on the meta device
        count = embeddings.position_embedding.num_embeddings
        embeddings.position_ids = torch.arange(count)[None]
    return model.eval().requires_grad_(False)
