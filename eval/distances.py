"""How far frames look apart, and what is made of it: a clip's steadiness, and how diverse samples of a prompt are."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eval.clip import CLIPScorer
from model import UserError
from weights import read_checkpoint
from weights.keymaps import Layout, best_layout, why_ignored

Distance = Callable[[Tensor, Tensor], Tensor]  # frames (n, 3, h, w) and others in [-1, 1] -> (n,)

# AlexNet's five convolutions: channels, kernel, stride, padding, and whether a pooling comes before
CONVS = (
    (64, 11, 4, 2, False),
    (192, 5, 1, 2, True),
    (384, 3, 1, 1, True),
    (256, 3, 1, 1, False),
    (256, 3, 1, 1, False),
)
SMALLEST = 31  # pixels of a side, of which the second pooling leaves one
# what LPIPS 0.1 takes off frames in [-1, 1], and divides them by: ImageNet's mean and deviation, rounded
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)

NUMBERS = (0, 3, 6, 8, 10)  # of the convolutions, as torchvision counts AlexNet's layers
# a whole state of lpips names them twice; 1 comes after a dropout, 0 is without; the last is what messages say
LINEAR = {f"{lin}{i}.model.{n}": f"linear.{i}" for lin in ("lins.", "lin") for n in (0, 1) for i in range(5)}
LAYOUTS = (
    Layout("torchvision", {f"features.{n}": f"convs.{i}" for i, n in enumerate(NUMBERS)} | LINEAR),
    Layout("lpips", {f"net.slice{i + 1}.{n}": f"convs.{i}" for i, n in enumerate(NUMBERS)} | LINEAR),
)
IGNORED = {
    r"classifier\..*": "AlexNet's classes of images, which come after what LPIPS compares",
    r"scaling_layer\.(shift|scale)": "constants that are the same in every file",
}
FILES = ("alexnet-owt-7be5be79.pth", "alex.pth")
WHERE_LPIPS_IS = (
    f"LPIPS needs two files in one folder: {FILES[0]}, torchvision's AlexNet, from https://download.pytorch.org/models/"
    f"{FILES[0]}, and {FILES[1]} from the folder lpips/weights/v0.1 of https://github.com/richzhang/PerceptualSimilarity"
    " (or one file with the tensors of both)"
)


@dataclass(frozen=True)
class FeatureDistance:
    """A distance between features of frames: of each frame they are found once, however many it is compared with.

    Args:
        name: printed beside each figure.
        features: frames (n, 3, h, w) in [-1, 1] -> tensors (n, ...).
        compare: such features, and others -> (n,).
    """

    name: str
    features: Callable[[Tensor], Sequence[Tensor]]
    compare: Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]

    def __call__(self, frames: Tensor, others: Tensor) -> Tensor:
        """Frames (n, 3, h, w) in [-1, 1], and n others of the same size -> (n,), on the CPU."""
        if frames.shape != others.shape:
            raise UserError(f"frames of {tuple(frames.shape)} and of {tuple(others.shape)} cannot be compared")
        return self.compare(self.features(frames), self.features(others))


class LPIPS(nn.Module):
    """Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", equation 1: AlexNet,
    version 0.1.
    """

    def __init__(self) -> None:
        super().__init__()
        widths = (3, *(width for width, *_ in CONVS))
        self.convs = nn.ModuleList(nn.Conv2d(width, *conv[:4]) for width, conv in zip(widths[:-1], CONVS, strict=True))
        self.linear = nn.ModuleList(nn.Conv2d(width, 1, 1, bias=False) for width in widths[1:])

    @torch.no_grad()
    def features(self, frames: Tensor) -> list[Tensor]:
        """Frames (n, 3, h, w) in [-1, 1] -> those of five layers (n, c, h', w'), of length 1 over channels.

        Raises:
            UserError: another shape, numbers that are not finite, or frames too small for AlexNet.
        """
        if frames.ndim != 4 or frames.shape[1] != 3 or min(frames.shape[-2:]) < SMALLEST or not len(frames):
            raise UserError(
                f"LPIPS compares frames (n, 3, h, w) of {SMALLEST} pixels a side or more, not {tuple(frames.shape)}"
            )
        if not frames.isfinite().all():
            raise UserError("there are numbers in the frames that are not finite (NaN or infinity)")
        device = self.convs[0].weight.device
        shift, scale = (torch.tensor(triple, device=device)[:, None, None] for triple in (SHIFT, SCALE))
        hidden, found = (frames.float().to(device) - shift) / scale, []
        for conv, (*_, pooled) in zip(self.convs, CONVS, strict=True):
            hidden = conv(F.max_pool2d(hidden, 3, 2) if pooled else hidden).relu()
            found.append(hidden / (hidden.norm(dim=1, keepdim=True) + 1e-10))
        return found

    @torch.no_grad()
    def compare(self, features: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
        """Features of n frames and of n others -> (n,): the layers' weighted squared differences, each a mean over
        places, summed.
        """
        layers = zip(self.linear, features, others, strict=True)
        return torch.stack([linear((a - b).square()).mean(dim=(1, 2, 3)) for linear, a, b in layers]).sum(dim=0).cpu()


def clip_distance(scorer: CLIPScorer) -> FeatureDistance:
    """1 - the cosine of two frames' CLIP features, in [0, 2]: what stands in for LPIPS where its weights are not given.

    Such figures are not comparable with LPIPS', hence the name that is printed with them.
    """

    def compare(features: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
        return (1 - (features[0] * others[0]).sum(dim=-1)).clamp_min(0)

    return FeatureDistance(f"1 - cosine of {scorer.name}", lambda frames: [scorer.images(frames)], compare)


def load_lpips(path: str | Path, device: str = "cpu") -> FeatureDistance:
    """LPIPS (Zhang et al. 2018; AlexNet, version 0.1) from given weights; nothing is downloaded, no pickle is run.

    Args:
        path: a folder with alexnet-owt-7be5be79.pth and alex.pth; or one file (safetensors or torch) with the tensors
            of both, named as torchvision and the lpips package do, or as in the state of an `lpips.LPIPS`.
        device: where it runs, in float32.

    Raises:
        UserError: files or tensors that are missing, left over, damaged or of another network.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"{path} does not exist. {WHERE_LPIPS_IS}")
    files = [path / name for name in FILES] if path.is_dir() else [path]
    if absent := [file.name for file in files if not file.is_file()]:
        raise UserError(f"{path} lacks {' and '.join(absent)}. {WHERE_LPIPS_IS}")
    tensors = {key: tensor for file in files for key, tensor in read_checkpoint(file).items()}
    network = LPIPS()
    network.load_state_dict(_ours(path, tensors, network.state_dict()))
    network.eval().requires_grad_(False).to(device)
    return FeatureDistance("LPIPS (AlexNet 0.1)", network.features, network.compare)


def frame_distance(video: Tensor, distance: Distance) -> float:
    """Customize-A-Video's temporal consistency of one clip: the mean distance from each frame to the next.

    The lower, the steadier; 0 is a still. In LPIPS there.

    Args:
        video: (f, 3, h, w) in [-1, 1], two frames or more.
        distance: `load_lpips`, or `clip_distance`.

    Raises:
        UserError: fewer than two frames.
    """
    if len(video) < 2:
        raise UserError(f"frames are compared with the next one, and a clip of {len(video)} has none to compare")
    first = torch.arange(len(video) - 1)
    return _between(distance, video, first, first + 1).mean().item()


def diversity(videos: Sequence[Tensor], distance: Distance) -> float:
    """Customize-A-Video's diversity of several samples of one prompt: the mean distance over all pairs of samples, each
    frame compared with the frame of the same number.

    The higher, the more they differ; 0 is one clip again and again. In LPIPS there.

    Args:
        videos: two or more clips (f, 3, h, w) in [-1, 1] of one size and length.
        distance: `load_lpips`, or `clip_distance`.

    Raises:
        UserError: fewer than two clips, clips without frames, or of several sizes or lengths.
    """
    shapes = {tuple(video.shape) for video in videos}
    if len(videos) < 2 or len(shapes) > 1 or 0 in next(iter(shapes)):
        raise UserError(
            f"diversity compares two or more clips of one size and length, not {len(videos)} of "
            f"{', '.join(map(str, sorted(shapes))) or 'any'}"
        )
    first, second = torch.tensor(list(combinations(range(len(videos)), 2))).unbind(dim=1)
    frames = zip(*videos, strict=True)  # frame by frame: features of whole clips may not fit into memory
    return torch.stack([_between(distance, torch.stack(same), first, second).mean() for same in frames]).mean().item()


def _between(distance: Distance, frames: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """The distances of `frames` numbered `first` to those numbered `second`."""
    if isinstance(distance, FeatureDistance):
        features = distance.features(frames)
        return distance.compare([layer[first] for layer in features], [layer[second] for layer in features])
    return distance(frames[first], frames[second])


def _ours(path: Path, tensors: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors under our names, every one of them accounted for."""
    layout = best_layout(tensors, LAYOUTS)
    named = {key: layout.to_ours(key) for key in tensors}
    found = {name: tensors[key].float() for key, name in named.items() if name is not None}
    unknown = [key for key, name in named.items() if name not in wanted and why_ignored(key, IGNORED) is None]
    theirs = {name: str(layout.from_ours(name)) for name in wanted}
    missing = [theirs[name] for name in wanted if name not in found]
    strange = [theirs[n] for n in wanted if n in found and found[n].shape != wanted[n].shape]
    broken = [theirs[n] for n in wanted if n in found and not found[n].isfinite().all()]
    faults = {"missing": missing, "of another shape": strange, "left over": unknown, "not finite": broken}
    if any(faults.values()):
        said = "; ".join(f"{what}: {', '.join(keys[:4])}" for what, keys in faults.items() if keys)
        raise UserError(f"{path} does not hold LPIPS' weights ({said}). {WHERE_LPIPS_IS}")
    return {name: found[name] for name in wanted}
