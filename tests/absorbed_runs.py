"""Small runs of motion behind absorbers, on the `material` of conftest.py."""

from small_runs import logged, motion

from sampling import read_video, write_media
from train.motion import train_motion

STILL = {"learning_rate": 1e-12, "dropout": 0.0, "steps": 2, "seed": 3}  # the motion LoRA's B stays at zero
PROMPT = "a <look> dog runs"


def run(base, material, out, absorbers, **changes):
    """The loss of each step."""
    settings = {"prompt": PROMPT, "debiased": False, "absorbers": [str(each) for each in absorbers], **STILL, **changes}
    train_motion(motion(material, out, **settings), base)
    return logged(out)


def clip(material, frames=3):
    return read_video(material / "clip.mp4", frames, 32, 32)


def reversed_clip(folder, frames):
    """The frames as lossless pictures in a folder."""
    for i, frame in enumerate(frames):
        write_media(folder / "frames" / f"{i}.png", frame[None])
    return folder / "frames"
