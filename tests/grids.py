"""A small grid of ablations on the `material` of conftest.py."""

from eval.grid_settings import GridSettings

QUICK = {"steps": "1", "rank": "2"}
ARMS = {
    "base": {},
    "looks": {"appearance": QUICK},
    "both": {"appearance": QUICK, "motion": QUICK},
    "TTT": {"appearance": QUICK, "motion": QUICK, "ttt": {"steps": "1"}},
    "other layers": {"appearance": {**QUICK, "layers": ["0", "1"]}, "motion": QUICK},
    "joint": {"joint": QUICK},
}


def settings_for(tmp_path, material, **changed):
    told = {
        "out": str(tmp_path / "grid"),
        "subjects": {"toy": {"name": "a toy", "images": str(material / "photos"), "trigger": "toy"}},
        "motions": {"roll": {"name": "rolling", "prompt": "a ball is rolling", "video": str(material / "clip.mp4")}},
        "groups": ["toy+roll"],
        "prompts": ["{subject} is {motion} on the sand"],
        "seeds": [0, 1],
        "arms": ARMS,
        "compare": ["both - base", "TTT - both"],
        "clips": 2,
        "scores": {"tracker": "lucas-kanade", "still": "0"},
    }
    return GridSettings(**{**told, **changed})
