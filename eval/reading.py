"""The judge: a small network that says what is to be seen in a frame of the rendered world, where, and how it moves."""

from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eval.measures import aligned, placement
from model import UserError
from train.world import BACKGROUNDS, COLOURS, SIZE, WORLD_MOTIONS, WORLD_SHAPES, WORLD_TEXTURES
from weights import Base, read_checkpoint, sha256

JUDGE = Path(__file__).with_name("judge.safetensors")
ATTRIBUTES = {
    "shape": len(WORLD_SHAPES),
    "colour": len(COLOURS),
    "texture": len(WORLD_TEXTURES),
    "background": len(BACKGROUNDS),
}
MOMENTS = 16  # the motion head sees a path at so many moments, whatever the clip's number of frames
TRACKS = 7  # what it sees of each: x, y and the size's logarithm, the steps of these, and how much the inside turns


@dataclass(frozen=True)
class FrameReading:
    """What a judge sees in n frames: logits of each attribute (n, classes), and of the mask (n, 1, 64, 64)."""

    shape: Tensor
    colour: Tensor
    texture: Tensor
    background: Tensor
    mask: Tensor


@dataclass(frozen=True)
class ClipReading:
    """What a judge sees in n clips of f frames.

    Args:
        shape: probabilities over WORLD_SHAPES, the mean of all frames' (n, 7).
        colour: over COLOURS (n, 8).
        texture: over WORLD_TEXTURES (n, 4).
        background: over BACKGROUNDS (n, 6).
        motion: over WORLD_MOTIONS (n, 12).
        path: x and y of the subject's centroid in frame widths from the centre, and its size, the square root of its
            area in frame widths (n, f, 3).
        turning: how much the subject's inside changes to the next frame once place and size are aligned (n, f - 1).
        masks: the subject's share of each pixel (n, 1, f, 64, 64) in [0, 1].
    """

    shape: Tensor
    colour: Tensor
    texture: Tensor
    background: Tensor
    motion: Tensor
    path: Tensor
    turning: Tensor
    masks: Tensor


class Judge(nn.Module):
    """Frames to attributes and a mask, at half the resolution inside; paths to motions."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = block(12, 24)
        self.middle = nn.Sequential(block(24, 48, stride=2), block(48, 48))
        self.coarse = nn.Sequential(block(48, 64, stride=2), block(64, 64))
        self.up_middle = block(64 + 48, 24)
        self.up_fine = block(24 + 24, 24)
        self.mask = nn.Conv2d(24, 4, 3, padding=1)
        self.heads = nn.ModuleDict({name: nn.Linear(48 + 3 * 64, count) for name, count in ATTRIBUTES.items()})
        self.motion = nn.Sequential(
            nn.Conv1d(TRACKS, 24, 3, padding=1),
            nn.ReLU(),
            nn.Conv1d(24, 24, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(24 * MOMENTS, len(WORLD_MOTIONS)),
        )

    def forward(self, frames: Tensor) -> FrameReading:
        """Frames (n, 3, 64, 64) in [-1, 1] to what is to be seen in them."""
        half = self.fine(F.pixel_unshuffle(frames, 2))
        quarter = self.middle(half)
        eighth = self.coarse(quarter)
        up = self.up_middle(torch.cat([F.interpolate(eighth, scale_factor=2), quarter], dim=1))
        up = self.up_fine(torch.cat([F.interpolate(up, scale_factor=2), half], dim=1))
        mask = F.pixel_shuffle(self.mask(up), 2)
        # the attributes are those of what the mask covers: their gradients must not bend it
        subject = mask.detach().sigmoid()
        seen = [
            pooled(quarter, F.avg_pool2d(subject, 4)),
            pooled(eighth, F.avg_pool2d(subject, 8)),
            pooled(eighth, 1 - F.avg_pool2d(subject, 8)),
            eighth.amax(dim=(2, 3)),
        ]
        logits = {name: head(torch.cat(seen, dim=1)) for name, head in self.heads.items()}
        return FrameReading(**logits, mask=mask)


def block(channels: int, width: int, stride: int = 1) -> nn.Sequential:
    """(n, channels, h, w) -> (n, width, h / stride, w / stride)."""
    conv = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU())


def pooled(features: Tensor, weight: Tensor) -> Tensor:
    """The weighted mean over places: features (n, c, h, w) and weights (n, 1, h, w) -> (n, c)."""
    return (features * weight).sum(dim=(2, 3)) / (weight.sum(dim=(2, 3)) + 1e-3)


def tracks(path: Tensor, turning: Tensor) -> Tensor:
    """What the motion head sees of paths (n, f, 3) and turnings (n, f - 1): (n, TRACKS, MOMENTS).

    Where in the frame, and how large a subject is on the whole, says nothing of its motion, and is taken off.
    """
    place = torch.cat([path[..., :2], path[..., 2:].clamp_min(0.02).log()], dim=-1).transpose(1, 2)
    place = F.interpolate(place, MOMENTS, mode="linear", align_corners=True)
    turns = F.interpolate(turning[:, None], MOMENTS, mode="linear", align_corners=True)
    steps = F.pad(place.diff(dim=-1), (1, 0))
    return torch.cat([4 * (place - place.mean(dim=-1, keepdim=True)), 20 * steps, 10 * turns], dim=1)


@torch.no_grad()
def read_clip(judge: Judge, videos: Tensor) -> ClipReading:
    """What `judge` sees in videos (n, 3, f, 64, 64) in [-1, 1], at least two frames long.

    Raises:
        UserError: videos of another shape.
    """
    if videos.ndim != 5 or videos.shape[1] != 3 or videos.shape[2] < 2 or videos.shape[3:] != (64, 64):
        raise UserError(f"the judge reads clips (n, 3, f, 64, 64) of two frames or more, not {tuple(videos.shape)}")
    count, frames = len(videos), videos.transpose(1, 2).flatten(0, 1)
    readings = [judge(part) for part in frames.split(128)]
    seen = {
        name: torch.cat([getattr(reading, name) for reading in readings]).unflatten(0, (count, -1))
        for name in (field.name for field in fields(FrameReading))
    }
    masks = seen.pop("mask").sigmoid()  # (n, f, 1, h, w)
    path, turning = read_path(videos, masks.transpose(1, 2))
    probabilities = {name: logits.softmax(dim=-1).mean(dim=1) for name, logits in seen.items()}
    motion = judge.motion(tracks(path, turning)).softmax(dim=-1)
    return ClipReading(**probabilities, motion=motion, path=path, turning=turning, masks=masks.transpose(1, 2))


def read_path(videos: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Paths (n, f, 3) and turnings (n, f - 1) of the subjects that `masks` (n, 1, f, h, w) cover in `videos`.

    Turning is the mean difference between the aligned subjects of neighbouring frames, colour and silhouette, within
    either of them.
    """
    count = len(videos)
    frames, covers = videos.transpose(1, 2).flatten(0, 1), masks.transpose(1, 2).flatten(0, 1)
    x, y, size = placement(covers).unbind(-1)
    path = torch.stack([x, y, size], dim=-1).unflatten(0, (count, -1))
    subject = aligned(torch.cat([frames * covers, covers], dim=1), placement(covers)).unflatten(0, (count, -1))
    either = torch.maximum(subject[:, 1:, 3], subject[:, :-1, 3])
    change = subject.diff(dim=1).abs().mean(dim=2) * either
    return path, change.sum(dim=(2, 3)) / (either.sum(dim=(2, 3)) + 1e-3)


def judge_file(path: str | Path | None) -> Path:
    """The file that `load_judge` reads."""
    return JUDGE if path is None else Path(path)


def digest(path: Path) -> str | None:
    """What tells a file of weights from others in records of figures: its SHA-256; None where there is none."""
    return sha256(path) if path.is_file() else None


def check_readable(base: Base) -> None:
    """Before anything is trained or sampled: a base of clips that the judge cannot read is refused.

    Raises:
        UserError: clips of another size than the rendered world's.
    """
    recipe = base.recipe
    if not recipe.height == recipe.width == SIZE:
        raise UserError(
            f"{base.name} makes clips of {recipe.width}x{recipe.height} pixels, and the judge reads {SIZE}x{SIZE}: "
            "name a base of the rendered world"
        )


def load_judge(path: str | Path | None = None) -> Judge:
    """The judge in `path`, a safetensors file; None: the one that is shipped with the tiny base.

    Raises:
        UserError: a file that is missing, damaged or not a judge's.
    """
    path = judge_file(path)
    judge = Judge()
    tensors = {name: tensor.float() for name, tensor in read_checkpoint(path).items()}
    try:
        judge.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"{path} holds no judge of this version: {' '.join(str(error).split())}") from error
    return judge.eval().requires_grad_(False)
