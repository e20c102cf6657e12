"""Every test starts from the same seed and without the network; the files of a narrow random base are at hand."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import bases
import pytest
import torch
from clips import smooth

from model.motion import MotionModule
from sampling import write_media
from weights import Base, load_base

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores


def pytest_configure(config):
    """Oracles are computed on the CPU: a GPU is hidden from all but the tests that ask for one."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Files:
    """A random narrow base on disk, as a diffusers folder, with a MotionAdapter folder of a v3 motion module."""

    folder: Path
    adapter: Path

    def flags(self) -> dict[str, str]:
        """What a command is given to use it."""
        return {"base": str(self.folder), "motion_module": str(self.adapter), "device": "cpu"}


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> Files:
    root = tmp_path_factory.mktemp("base")
    return Files(bases.write_base(root / "sd15"), bases.write_motion_adapter(root / "motion"))


@pytest.fixture
def base(files) -> Base:
    """The narrow base, with a recipe of few steps on small clips."""
    return small_base(files)


def small_base(files) -> Base:
    """What `base` is, for modules that load it once."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_base(files.folder, files.adapter, device="cpu")
    small = {"rank": 4, "num_frames": 3, "height": 32, "width": 32, "sampling_steps": 3, "reference_steps": 2}
    loaded.recipe = replace(loaded.recipe, **small)
    return loaded


def pool_module_norms(unet) -> None:
    """Norm motion modules over frames, as diffusers does and AnimateDiff does not."""
    for module in unet.modules():
        if isinstance(module, MotionModule):
            module.pool_norm = True


@pytest.fixture(scope="session")
def material(tmp_path_factory):
    """A folder of three pictures, one with its own caption, and a clip of five frames."""
    root = tmp_path_factory.mktemp("material")
    (root / "photos").mkdir()
    for i, size in enumerate([(48, 80), (40, 40), (64, 48)]):
        smooth(*size).rotate(90 * i).save(root / "photos" / f"{i}.png")
    (root / "photos" / "1.txt").write_text("a red ball on the beach")
    frames = torch.stack([torch.roll(torch.rand(3, 32, 32), 3 * i, dims=-1) for i in range(5)]) * 2 - 1
    write_media(root / "clip.mp4", frames, fps=8)
    return root
