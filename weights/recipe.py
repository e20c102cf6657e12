"""A base's own recipe, kept beside its weights."""

from dataclasses import asdict
from pathlib import Path

from model import Recipe, UserError
from weights.files import read_json, write_json
from weights.settings import settings_from

RECIPE = "recipe.json"


def read_recipe(base: Path) -> Recipe:
    """The recipe in a base's folder; Stable Diffusion's where the folder brings none, or the base is a file.

    What the file leaves out is as in Stable Diffusion's.

    Raises:
        UserError: the file is damaged, or has a key or a type of value that a recipe has not.
    """
    path = base / RECIPE
    if not path.is_file():
        return Recipe()
    table = read_json(path)
    if not isinstance(table, dict):
        raise UserError(f"{path} should hold a JSON object, not {type(table).__name__}")
    recipe = settings_from(Recipe, table, str(path))
    layers = [*recipe.appearance_layers, *recipe.motion_layers]
    if any(not 0 <= layer <= 8 for layer in layers):
        raise UserError(f"{path}: layers are counted from 0 to 8, not {', '.join(map(str, layers))}")
    return recipe


def write_recipe(base: Path, recipe: Recipe) -> None:
    """Write the recipe into a base's folder; raises UserError where the system refuses."""
    write_json(base / RECIPE, asdict(recipe))
