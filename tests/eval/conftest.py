"""What the measures are tried on: a judge of random weights, and a narrow base of clips that it reads."""

from dataclasses import replace

import pytest
from safetensors.torch import save_file

from eval import Judge


@pytest.fixture
def judge(tmp_path):
    """The file of a judge of random weights."""
    path = tmp_path / "judge.safetensors"
    save_file(Judge().state_dict(), path)
    return str(path)


@pytest.fixture
def small(base):
    """The narrow base with clips as small as the judge reads."""
    base.recipe = replace(base.recipe, num_frames=2, height=64, width=64)
    return base
