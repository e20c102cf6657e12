"""What the judge's motion head learns from."""

import torch

from eval.judge import wobbled
from train.world import WORLD_MOTIONS


def test_turning_tells_spinning_from_resting_alone():
    """What travels may wobble like anything that stays; what stays keeps its own turning."""
    motions = torch.arange(12).repeat(50)
    stays = (motions == WORLD_MOTIONS.index("spinning")) | (motions == WORLD_MOTIONS.index("resting"))
    seen = torch.arange(600.0)[:, None, None].expand(-1, 7, 16)  # each track says which clip it is of
    picked = torch.arange(600)
    found = wobbled(seen, motions, picked, torch.Generator().manual_seed(0))
    assert torch.equal(found[:, :-1], seen[:, :-1])
    assert torch.equal(found[stays], seen[stays])
    donors = motions[found[~stays][:, -1, 0].long()].bincount(minlength=12)
    rests, spins = (donors[WORLD_MOTIONS.index(name)].item() for name in ("resting", "spinning"))
    assert rests + spins == 500
    assert 200 < spins < 300
