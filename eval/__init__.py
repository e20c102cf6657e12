"""What clips are worth: a judge of the rendered world, and measures of likeness and of motion."""

from eval.measures import crossed_interval, identity, path_error
from eval.reading import ClipReading, Judge, load_judge, read_clip

__all__ = [
    "ClipReading",
    "Judge",
    "crossed_interval",
    "identity",
    "load_judge",
    "path_error",
    "read_clip",
]
