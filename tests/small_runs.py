"""Settings of small runs of stages 1 and 2, of absorbers and of joint training, on the `material` of conftest.py; and
their end before its time.
"""

from contextlib import contextmanager

import pytest

from train.absorber import UNUSED, AbsorberSettings
from train.appearance import AppearanceSettings
from train.folder import RunFolder
from train.joint import JointSettings
from train.motion import MotionSettings


def appearance(material, out, **changes):
    return AppearanceSettings(
        **{"images": str(material / "photos"), "prompt": "a teddy bear", "out": str(out), "steps": 3, **changes}
    )


def motion(material, out, **changes):
    return MotionSettings(
        **{"video": str(material / "clip.mp4"), "prompt": "a man runs", "out": str(out), "steps": 3, **changes}
    )


def absorber(material, out, **changes):
    """Of the changes only those that its kind has a use for."""
    prompt = "a dog" if changes.get("kind") == "lora" else "a <look> dog"
    given = {"video": str(material / "clip.mp4"), "prompt": prompt, "initializer": "dog", "out": str(out)}
    unused = UNUSED.get(changes.get("kind", "dual"), ("", ()))[1]
    settings = {**given, "steps": 3, "crops": 6, **changes}
    return AbsorberSettings(**{name: value for name, value in settings.items() if name not in unused})


def joint(material, out, **changes):
    photos = {"images": str(material / "photos"), "appearance_prompt": "a teddy bear"}
    given = {"video": str(material / "clip.mp4"), "prompt": "a man runs", "out": str(out), "steps": 3}
    return JointSettings(**{**photos, **given, **changes})


def logged(folder):
    """The loss of each step of a run of one LoRA."""
    return [float(row.split(",")[1]) for row in (folder / "log.csv").read_text().splitlines()[1:]]


@contextmanager
def broken_off(step):
    """A run in the block is broken off in that step, its states left behind."""
    log = RunFolder.log

    def stop(self, number, *rest):
        if number == step:
            raise KeyboardInterrupt
        log(self, number, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "log", stop)
        with pytest.raises(KeyboardInterrupt):
            yield
