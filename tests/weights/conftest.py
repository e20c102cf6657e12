"""A run to export and a network to load LoRAs into, each made once."""

import shutil

import pytest
from exports import SPECS, written
from lora_files import small, without_adapters

from model import SD15_V2


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A file of both parts, and their A and B."""
    path = tmp_path_factory.mktemp("trained") / "lora.safetensors"
    return path, written(small(SD15_V2), path, **SPECS)


@pytest.fixture
def run(trained, tmp_path):
    """A run folder as test-time training leaves it, and what is in it."""
    path, halves = trained
    (tmp_path / "run").mkdir()
    shutil.copy(path, tmp_path / "run")
    return tmp_path / "run", halves


@pytest.fixture(scope="session")
def shared():
    """What `unet` is: v3, or what a module puts in its place."""
    return small()


@pytest.fixture
def unet(shared):
    """A random narrow network, the same one for every test: each gets it without adapters."""
    yield shared
    without_adapters(shared)
