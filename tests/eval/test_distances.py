"""LPIPS against the lpips package and against its equation; what is made of distances against loops."""

import importlib
import shutil
import sys
import types
from itertools import combinations
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from eval.clip import load_clip
from eval.distances import clip_distance, diversity, frame_distance, load_lpips
from model import UserError
from train.world import random_scenes, render

LAYERS = (0, 3, 6, 8, 10)


def alexnet():
    """torchvision's AlexNet up to its classes, as its documentation prints it."""
    return nn.Sequential(
        nn.Conv2d(3, 64, kernel_size=11, stride=4, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(kernel_size=3, stride=2),
        nn.Conv2d(64, 192, kernel_size=5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(kernel_size=3, stride=2),
        nn.Conv2d(192, 384, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, kernel_size=3, padding=1),
        nn.ReLU(),
    )


def random_tensors(seed=0):
    """One file's: torchvision's AlexNet and lpips' linear layers, which are not negative."""
    torch.manual_seed(seed)
    net = alexnet()
    tensors = {f"features.{name}": tensor.clone() for name, tensor in net.state_dict().items()}
    widths = [net[layer].out_channels for layer in LAYERS]
    return tensors | {f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1) for i, width in enumerate(widths)}


@pytest.fixture
def lpips(monkeypatch):
    """The package itself; where torchvision is not installed, AlexNet comes from this file."""
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):  # a build for another torch
        models = types.ModuleType("torchvision.models")
        models.alexnet = lambda pretrained=False: types.SimpleNamespace(features=alexnet())
        vision = types.ModuleType("torchvision")
        vision.models = models
        monkeypatch.setitem(sys.modules, "torchvision", vision)
        monkeypatch.setitem(sys.modules, "torchvision.models", models)
    package = pytest.importorskip("lpips", exc_type=ImportError)
    yield package
    for name in [name for name in sys.modules if name.split(".")[0] == "lpips"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("lpips") / "lpips.safetensors"
    save_file(random_tensors(), path)
    return path


def videos(count, frames=3, size=64, seed=0):
    return torch.rand((count, frames, 3, size, size), generator=torch.Generator().manual_seed(seed)) * 2 - 1


def by_the_equation(tensors, a, b):
    """LPIPS of two frames (3, h, w), place by place."""
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    net = alexnet()
    net.load_state_dict({n.removeprefix("features."): t for n, t in tensors.items() if n.startswith("features.")})
    total = 0.0
    with torch.no_grad():
        for i, layer in enumerate(LAYERS):
            x, y = (net[: layer + 2](((f - shift[:, None, None]) / scale[:, None, None])[None])[0] for f in (a, b))
            weight = tensors[f"lin{i}.model.1.weight"].flatten()
            places = [
                (weight * (F.normalize(x[:, v, u], dim=0) - F.normalize(y[:, v, u], dim=0)) ** 2).sum()
                for v in range(x.shape[1])
                for u in range(x.shape[2])
            ]
            total += sum(places) / len(places)
    return float(total)


@pytest.mark.parametrize("size", [31, 64, 75])
def test_lpips_follows_its_equation(weights, size):
    a, b = videos(1, 2, size)[0]
    expected = by_the_equation(random_tensors(), a, b)
    assert load_lpips(weights)(a[None], b[None]).item() == pytest.approx(expected, rel=1e-5)
    assert expected > 0.01


@pytest.mark.parametrize("form", ["state.pth", "state.safetensors", "whole.pth"])
def test_lpips_equals_the_package(lpips, tmp_path, form):
    torch.manual_seed(3)
    theirs = lpips.LPIPS(pretrained=False, pnet_rand=True, net="alex", verbose=False).eval()
    state = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    path = tmp_path / form
    if path.suffix == ".safetensors":
        save_file({name: tensor for name, tensor in state.items() if not name.startswith("lin0")}, path)
    else:
        torch.save({"state_dict": state} if form == "whole.pth" else state, path)
    a, b = videos(2, 5, 80)
    ours, expected = load_lpips(path)(a, b), theirs(a, b).detach().flatten()
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    assert expected.std() > 1e-5


def test_a_folder_holds_the_published_two_files(lpips, tmp_path):
    linear = Path(lpips.__file__).parent / "weights" / "v0.1" / "alex.pth"
    shutil.copy(linear, tmp_path)
    tensors = {name: tensor for name, tensor in random_tensors().items() if name.startswith("features")}
    torch.save(tensors | {"classifier.1.weight": torch.zeros(8, 8)}, tmp_path / "alexnet-owt-7be5be79.pth")
    theirs = lpips.LPIPS(pretrained=True, pnet_rand=True, net="alex", verbose=False).eval()
    numbered = {f"slice{LAYERS.index(int(n.split('.')[1])) + 1}.{n.split('.', 1)[1]}": t for n, t in tensors.items()}
    theirs.net.load_state_dict(numbered)
    a, b = videos(2, 4)
    torch.testing.assert_close(load_lpips(tmp_path)(a, b), theirs(a, b).detach().flatten(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("lin3.model.1.weight"), r"missing: lin3\.model\.1\.weight"),
        (lambda t: t.pop("features.8.bias"), r"missing: features\.8\.bias"),
        (lambda t: t.update({"features.0.weight": torch.zeros(64, 3, 3, 3)}), r"another shape: features\.0\.weight"),
        (lambda t: t.update({"features.1.weight": torch.zeros(3)}), r"left over: features\.1\.weight"),
        (lambda t: t["features.0.bias"].fill_(torch.nan), r"not finite: features\.0\.bias"),
    ],
)
def test_weights_are_accounted_for(tmp_path, change, said):
    tensors = random_tensors()
    change(tensors)
    save_file(tensors, tmp_path / "lpips.safetensors")
    with pytest.raises(UserError, match=said) as caught:
        load_lpips(tmp_path / "lpips.safetensors")
    assert "alexnet-owt-7be5be79.pth" in str(caught.value)
    assert "PerceptualSimilarity" in str(caught.value)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"lacks alexnet-owt-7be5be79\.pth and alex\.pth"):
        load_lpips(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        load_lpips(tmp_path / "nothing.pth")


def test_frames_that_lpips_cannot_compare(weights):
    distance = load_lpips(weights)
    for shape in [(2, 3, 30, 64), (2, 1, 64, 64), (0, 3, 64, 64)]:
        with pytest.raises(UserError, match="31 pixels a side"):
            distance(torch.zeros(shape), torch.zeros(shape))
    with pytest.raises(UserError, match="cannot be compared"):
        distance(torch.zeros(1, 3, 64, 64), torch.zeros(2, 3, 64, 64))
    with pytest.raises(UserError, match="not finite"):
        distance(torch.full((1, 3, 64, 64), torch.nan), torch.zeros(1, 3, 64, 64))


def distances(weights):
    return load_lpips(weights), clip_distance(load_clip()), lambda a, b: (a - b).abs().mean(dim=(1, 2, 3))


@pytest.mark.parametrize("which", [0, 1, 2])
def test_frame_distance_and_diversity_are_loops(weights, which):
    distance, clips = distances(weights)[which], videos(3, 4)
    apart = [distance(clips[0, i][None], clips[0, i + 1][None]).item() for i in range(3)]
    assert frame_distance(clips[0], distance) == pytest.approx(sum(apart) / 3, abs=1e-6)
    assert max(apart) - min(apart) > 1e-4
    apart = [distance(a[i][None], b[i][None]).item() for a, b in combinations(clips, 2) for i in range(4)]
    assert diversity(list(clips), distance) == pytest.approx(sum(apart) / len(apart), abs=1e-6)
    assert len(apart) == 12


@pytest.mark.parametrize("which", [0, 1, 2])
def test_the_same_again_is_0_apart(weights, which):
    distance, clip = distances(weights)[which], videos(1, 4)[0]
    assert diversity([clip, clip, clip], distance) == pytest.approx(0, abs=1e-6)
    assert frame_distance(clip[:1].expand(4, -1, -1, -1), distance) == pytest.approx(0, abs=1e-6)
    assert diversity([clip, clip.flip(0)], distance) > 1e-3


def test_clip_distance_is_1_less_the_cosine():
    scorer, (a, b) = load_clip(), videos(2, 3)
    expected = 1 - F.cosine_similarity(scorer.images(a), scorer.images(b))
    torch.testing.assert_close(clip_distance(scorer)(a, b), expected, atol=1e-6, rtol=0)
    assert "tiny CLIP" in clip_distance(scorer).name


def test_steadier_clips_are_less_apart(weights):
    clip = render(random_scenes(1, torch.Generator().manual_seed(0)))[0][0].transpose(0, 1)
    shaken = (clip + 0.3 * torch.randn(clip.shape, generator=torch.Generator().manual_seed(1))).clamp(-1, 1)
    for distance in distances(weights):
        assert frame_distance(clip, distance) < frame_distance(shaken, distance)


def test_features_are_found_once_for_each_frame():
    scorer, seen = load_clip(), []
    counted, clips = scorer.images, list(videos(4, 3))
    scorer.images = lambda frames: seen.append(len(frames)) or counted(frames)
    diversity(clips, clip_distance(scorer))
    assert sum(seen) == 12
    frame_distance(clips[0], clip_distance(scorer))
    assert sum(seen) == 15


def test_what_has_nothing_to_compare_is_refused():
    def distance(a, b):
        return (a - b).abs().mean(dim=(1, 2, 3))

    with pytest.raises(UserError, match="a clip of 1"):
        frame_distance(videos(1, 1)[0], distance)
    for clips in ([], list(videos(1)), [videos(1)[0], videos(1, 4)[0]], list(videos(2, 0))):
        with pytest.raises(UserError, match="two or more clips"):
            diversity(clips, distance)
