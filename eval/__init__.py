"""What clips are worth: the papers' scores, a judge of the rendered world, prompt influence and ablations."""

from eval.clip import CLIPScorer, clip_i, clip_t, load_clip, temporal_consistency
from eval.distances import diversity, frame_distance, load_lpips
from eval.fidelity import chance_level, motion_fidelity, moving, published_fidelity
from eval.measures import crossed_interval, identity, path_error
from eval.reading import ClipReading, Judge, load_judge, read_clip
from eval.tracks import Tracks, load_cotracker, lucas_kanade, true_tracks

__all__ = [
    "CLIPScorer",
    "ClipReading",
    "Judge",
    "Tracks",
    "chance_level",
    "clip_i",
    "clip_t",
    "crossed_interval",
    "diversity",
    "frame_distance",
    "identity",
    "load_clip",
    "load_cotracker",
    "load_judge",
    "load_lpips",
    "lucas_kanade",
    "motion_fidelity",
    "moving",
    "path_error",
    "published_fidelity",
    "read_clip",
    "temporal_consistency",
    "true_tracks",
]
