"""A narrow network to put adapters on, and what goes into it."""

from dataclasses import replace

import pytest
import torch
from oracles import randomise

from model import SD15_V3, UNet3D


@pytest.fixture
def unet():
    config = replace(SD15_V3, block_out_channels=(32, 64, 64, 64), cross_attention_dim=48)
    return randomise(UNet3D(config)).eval().requires_grad_(False)


@pytest.fixture
def inputs():
    return torch.randn(1, 4, 2, 8, 8), torch.tensor([500]), torch.randn(1, 5, 48)
