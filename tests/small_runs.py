"""Settings of small runs of stages 1 and 2 on the `material` of conftest.py."""

from train.appearance import AppearanceSettings
from train.motion import MotionSettings


def appearance(material, out, **changes):
    return AppearanceSettings(
        **{"images": str(material / "photos"), "prompt": "a teddy bear", "out": str(out), "steps": 3, **changes}
    )


def motion(material, out, **changes):
    return MotionSettings(
        **{"video": str(material / "clip.mp4"), "prompt": "a man runs", "out": str(out), "steps": 3, **changes}
    )
