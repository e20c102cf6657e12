"""Absorbers to train motion behind, made once."""

import pytest
from conftest import small_base
from small_runs import absorber

from train.absorber import train_absorber

STRONG = {"learning_rate": 1e-2, "token_learning_rate": 1e-1, "steps": 2, "rank": 2}


@pytest.fixture(scope="session")
def looks(files, material, tmp_path_factory):
    """A finished dual run on the clip, and one with another seed, whose token is called the same."""
    root, base = tmp_path_factory.mktemp("looks"), small_base(files)
    for seed in (0, 1):
        train_absorber(absorber(material, root / str(seed), seed=seed, **STRONG), base)
    return root
