"""Photos of a subject and a clip of a motion that the tiny base never saw, rendered."""

import torch
from torch import Tensor

from sampling import derived_seed
from train.world import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT_MOTIONS,
    HELD_OUT_SUBJECTS,
    MOTIONS,
    SHAPES,
    TEXTURES,
    UNSEEN,
    held_out_scenes,
    make_scenes,
    render,
)

# Words of the tiny base's vocabulary that mean any subject and any motion to it.
SUBJECT_WORD, MOTION_WORD = "zor", "dax"
PERFORMER = ("plain", "yellow", "circle")  # texture, colour, shape: an ordinary one of the world moves in the reference
STAGE = "sea"  # where it does
BACKGROUND = "road"  # of what is generated: in no photo, and grey, so that every subject can be seen on it
NUM_PHOTOS = 4
PHOTOGRAPHED = "is resting"  # in photos; prompts have a verb too, and a bare "a zor" would be learnt for itself alone


def photos(subject: int, side: int, seed: int) -> tuple[Tensor, Tensor]:
    """Photos of one of HELD_OUT_SUBJECTS at rest, each over a background of its own.

    Args:
        subject: from 0 to 4.
        side: pixels, even.
        seed: of places, sizes and scenery.

    Returns:
        Photos (4, 3, side, side) in [-1, 1], and the subject's share of each pixel (4, 1, side, side).
    """
    generator = torch.Generator().manual_seed(derived_seed(seed, "photos", subject))
    first, second = HELD_OUT_SUBJECTS[subject][2:]
    seen = [name for name in BACKGROUNDS if name != BACKGROUND and (first, name) not in UNSEEN]
    seen.sort(key=lambda name: (second, name) in UNSEEN)  # half a subject that melts into the ground: if need be
    now = torch.zeros(1, 1)
    shots = [render(held_out_scenes(subject, "resting", name, 1, generator, now), side) for name in seen[:NUM_PHOTOS]]
    frames, masks = (torch.cat(parts)[:, :, 0] for parts in zip(*shots, strict=True))
    return frames, masks


def reference_clip(motion: int, frames: int, side: int, seed: int) -> Tensor:
    """A clip of one of HELD_OUT_MOTIONS, performed by an ordinary inhabitant of the world (PERFORMER).

    Args:
        motion: from 0 to 4.
        frames: how many show the whole of it.
        side: pixels, even.
        seed: of where it starts, sizes and scenery.

    Returns:
        (frames, 3, side, side) in [-1, 1].
    """
    generator = torch.Generator().manual_seed(derived_seed(seed, "reference"))
    texture, colour, shape = PERFORMER
    named = (
        (SHAPES, shape),
        (TEXTURES, texture),
        (COLOURS, colour),
        (BACKGROUNDS, STAGE),
        (MOTIONS, HELD_OUT_MOTIONS[motion]),
    )
    numbers = [torch.tensor([list(names).index(name)]) for names, name in named]
    shape_, texture_, colour_, background, moves = numbers
    times = torch.linspace(0, 1, frames).expand(1, -1)
    scene = make_scenes(shape_, texture_, colour_, None, background, moves, generator, times)
    return render(scene, side)[0][0].transpose(0, 1)
