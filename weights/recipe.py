"""A base's own recipe, kept beside its weights."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from model import Recipe, UserError
from weights.files import read_json, write_json
from weights.settings import settings_from

RECIPE = "recipe.json"

# Fields, what they must be, and whether they are.
RULES: tuple[tuple[tuple[str, ...], str, Callable[[Any], bool]], ...] = (
    (
        ("appearance_layers", "motion_layers"),
        "one or more layers, counted from 0 to 8",
        lambda layers: len(layers) > 0 and all(0 <= layer <= 8 for layer in layers),
    ),
    (
        (
            *("rank", "appearance_steps", "motion_steps", "ttt_steps", "appearance_batch_size", "motion_batch_size"),
            *("num_frames", "fps"),
        ),
        "at least 1",
        lambda number: number >= 1,
    ),
    (("reference_steps", "sampling_steps"), "from 1 to 1000", lambda number: 1 <= number <= 1000),
    (
        ("appearance_learning_rate", "motion_learning_rate", "ttt_learning_rate"),
        "above 0 and at most 1",
        lambda rate: 0 < rate <= 1,
    ),
    (("timestep_skew",), "above 0 and at most 10", lambda skew: 0 < skew <= 10),
    (("dropout",), "at least 0 and below 1", lambda share: 0 <= share < 1),
    (("weight_decay", "guidance_scale"), "from 0 to 1000", lambda number: 0 <= number <= 1000),
    (("height", "width"), "positive and divisible by 8", lambda size: size >= 8 and size % 8 == 0),
)


def read_recipe(base: Path) -> Recipe:
    """The recipe in a base's folder; Stable Diffusion's where the folder brings none, or the base is a file.

    What the file leaves out is as in Stable Diffusion's.

    Raises:
        UserError: the file is damaged, or has a key or a type of value that a recipe has not, or a number out of range.
    """
    path = base / RECIPE
    if not path.is_file():
        return Recipe()
    table = read_json(path)
    if not isinstance(table, dict):
        raise UserError(f"{path} should hold a JSON object, not {type(table).__name__}")
    recipe = settings_from(Recipe, table, str(path))
    check_recipe(recipe, path)
    return recipe


def check_recipe(recipe: Recipe, path: Path) -> None:
    """Raise UserError, naming the file `path` and the key, where a value is out of its range."""
    for names, words, fits in RULES:
        for name in names:
            value = getattr(recipe, name)
            if not fits(value):
                shown = " ".join(map(str, value)) if isinstance(value, tuple | list) else value
                raise UserError(f"{path}: {name} must be {words}, and is {shown if shown != '' else 'empty'}")


def write_recipe(base: Path, recipe: Recipe) -> None:
    """Write the recipe into a base's folder; raises UserError where a value is out of range, or the system refuses."""
    check_recipe(recipe, base / RECIPE)
    write_json(base / RECIPE, asdict(recipe))
