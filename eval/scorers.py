"""What scores clips: loaded once as the settings say, and described in the words that go with each figure."""

import importlib.util
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from eval.clip import CLIPScorer, load_clip
from eval.distances import Distance, clip_distance, load_lpips
from eval.reading import Judge, judge_file, load_judge
from eval.rendered import judge_tracker
from eval.tracks import WEIGHTS, Tracker, load_cotracker, lucas_kanade
from eval.words import LEAKING
from model import UserError
from weights import sha256
from weights.device import choose_device
from weights.load import TINY as TINY_BASE

TINY, TINY_CLIP = "tiny CLIP", TINY_BASE / "clip"
TRACKERS = {"lucas-kanade": "Lucas-Kanade", "cotracker": "CoTracker3", "judge": "the rendered world's judge"}


@dataclass(kw_only=True)
class ScorerSettings:
    """What scores.

    Args:
        clip: folder of a transformers CLIPModel; not given: the tiny base's, which knows the rendered world alone.
        protocol: of CLIP-T and temporal consistency: DreamVideo's (and CustomTTT's), or LOVEU-TGVE's, with CLIP-T times
            100 and all pairs of frames.
        tracker: of motion fidelity; the judge tracks the subject of clips of the rendered world.
        tracker_weights: file of CoTracker3's weights (scaled_offline.pth).
        still: pixels that a point must move to count for motion fidelity.
        lpips: LPIPS weights, a file or a folder of its two files; not given: distances are those of CLIP's features.
        judge: file of the rendered world's judge; not given: the one that comes along.
        world: true or false, whether to take the scores of the rendered world too; not given: where all clips have
            64x64 pixels and the tiny base's CLIP scores.
        device: "cuda", "cuda:1", "cpu"; not given: CUDA if there is one.
        batch_size: frames that CLIP sees at once.
    """

    clip: str | None = None
    protocol: Literal["dreamvideo", "loveu"] = "dreamvideo"
    tracker: Literal["lucas-kanade", "cotracker", "judge"] = "lucas-kanade"
    tracker_weights: str | None = None
    still: float = 0.5
    lpips: str | None = None
    judge: str | None = None
    world: bool | None = None
    device: str | None = None
    batch_size: int = 64


@dataclass(frozen=True)
class Scorers:
    """What scores, loaded.

    Args:
        clip: frames and prompts to features.
        protocol: "dreamvideo" or "loveu".
        tracker: of motion fidelity; None where there is none: OpenCV is not installed.
        tracker_name: as printed.
        still: pixels that a track must move to count.
        distance: of frames.
        distance_name: as printed.
        judge: of the rendered world; None: its scores are not taken.
        world: whether clips that the judge cannot read are an error; else they go without its scores.
        by_features: whether `distance` is that of `clip`'s features, which are at hand: it is not called then.
        batch_size: frames that CLIP sees at once.
    """

    clip: CLIPScorer
    protocol: str
    tracker: Tracker | None
    tracker_name: str
    still: float
    distance: Distance
    distance_name: str
    judge: Judge | None
    world: bool = False
    by_features: bool = False
    batch_size: int = 64


def open_scorers(settings: ScorerSettings) -> Scorers:
    """Load what the settings name.

    Raises:
        UserError: bad settings, or files that are missing, wrong or damaged; the message says where to get them.
    """
    if settings.batch_size < 1 or not (settings.still >= 0 and math.isfinite(settings.still)):
        raise UserError("batch_size must be at least 1, and still not negative")
    if settings.tracker == "cotracker" and settings.tracker_weights is None:
        raise UserError(f"--tracker cotracker needs --tracker_weights: {WEIGHTS}")
    if settings.tracker != "cotracker" and settings.tracker_weights is not None:
        raise UserError(f"--tracker_weights are CoTracker's, and {settings.tracker} has none: say --tracker cotracker")
    device = str(choose_device(settings.device))
    clip = load_clip(settings.clip, device)
    tracker: Tracker | None = None
    if settings.tracker_weights is not None:
        tracker = load_cotracker(settings.tracker_weights, device=device)
    elif settings.tracker == "judge":
        tracker = judge_tracker(load_judge(settings.judge))
    elif importlib.util.find_spec("cv2") is not None:
        tracker = lucas_kanade()
    distance = clip_distance(clip) if settings.lpips is None else load_lpips(settings.lpips, device)
    reads = settings.world or (settings.world is None and clip.name == TINY)
    return Scorers(
        clip=clip,
        protocol=settings.protocol,
        tracker=tracker,
        tracker_name=TRACKERS[settings.tracker],
        still=settings.still,
        distance=distance,
        distance_name=f"{distance.name}{', in place of LPIPS' if settings.lpips is None else ''}",
        judge=load_judge(settings.judge) if reads else None,
        world=bool(settings.world),
        by_features=settings.lpips is None,
        batch_size=settings.batch_size,
    )


def fingerprints(settings: ScorerSettings) -> dict[str, Any]:
    """What tells scores by these settings from others: the settings, the contents of their files, and what is there."""
    folder = TINY_CLIP if settings.clip is None else Path(settings.clip)
    named = [settings.tracker_weights, settings.lpips, judge_file(settings.judge)]
    files = sorted(its for path in (folder, *named) if path is not None for its in _files(Path(path)))
    return {
        "settings": {name: value for name, value in asdict(settings).items() if name not in ("device", "batch_size")},
        "files": {file.name: sha256(file) for file in files},
        "OpenCV": importlib.util.find_spec("cv2") is not None,
    }


def _files(path: Path) -> list[Path]:
    return [its for its in path.iterdir() if its.is_file()] if path.is_dir() else [path] if path.is_file() else []


TITLES: dict[str, str] = {
    "clip_t": "CLIP-T",
    "clip_i": "CLIP-I",
    "temporal_consistency": "temporal consistency",
    "frame_distance": "frame distance",
    "diversity": "diversity",
    "motion_fidelity": "motion fidelity",
    "chance": "chance level",
    "published_fidelity": "published fidelity",
    "identity": "identity",
    "path_error": "path error",
    **{f"leak_{name}": f"leak of {name}" for name in LEAKING},
}


def described(scorers: Scorers) -> dict[str, str]:
    """How each score was taken, in a line with its title, model and protocol, in the order of a table's columns."""
    clip, loveu = scorers.clip.name, scorers.protocol == "loveu"
    protocol = "LOVEU-TGVE's protocol" if loveu else "DreamVideo's protocol"
    moves = f"{scorers.tracker_name}, points that move {scorers.still:g} pixels or more"
    judge = "the rendered world's judge"
    about = {
        "clip_t": f"mean over frames of {'100 x ' if loveu else ''}cos(frame, prompt); {clip}, {protocol}",
        "clip_i": f"mean over frames and photos of cos(frame, photo); {clip}, DreamVideo's protocol",
        "temporal_consistency": f"mean cos of {'all pairs of' if loveu else 'consecutive'} frames; {clip}, {protocol}",
        "frame_distance": f"mean over consecutive frames; {scorers.distance_name}",
        "diversity": f"mean over pairs of samples of one prompt, frame by frame; {scorers.distance_name}",
        "motion_fidelity": f"symmetric mean, -1 to 1; {moves}",
        "chance": "motion fidelity of as many tracks whose steps are random; smooth ones match better",
        "published_fidelity": f"one-sided, as in Yatim et al.'s public code; {scorers.tracker_name}, all points, still "
        "steps count 0",
        "identity": f"likeness to the photos, 0 to 1, an unrelated subject has about 0.4; {judge}",
        "path_error": f"distance from the reference's path in its extents, 0 is the same; {judge}",
        **{
            f"leak_{name}": f"1 where a clip shows the reference's in place of what was asked for, else 0; {judge}"
            for name in LEAKING
        },
    }
    return {name: f"{title}: {about[name]}" for name, title in TITLES.items()}
