"""A base's own recipe: read, completed, and refused where it is damaged or out of range."""

import json

import pytest
from bases import write_base

import weights.load
from model import Recipe, UserError
from weights import load_base
from weights.recipe import RULES, read_recipe, write_recipe


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"ranks": 4}, r"ranks is not a setting\. Did you mean rank\?"),
        ({"rank": "many"}, r"rank: expected a whole number, got 'many'"),
        ({"rank": 4.5}, r"rank: expected a whole number"),
        ({"motion_layers": [2, "x"]}, r"motion_layers: expected one or more whole numbers"),
        ({"dropout": None}, r"dropout: expected a number"),
        ({"motion_layers": [2, 9]}, r"motion_layers must be one or more layers, counted from 0 to 8, and is 2 9"),
        ({"appearance_layers": []}, r"appearance_layers must be one or more layers, .* and is empty"),
        ({"rank": 0}, r"rank must be at least 1, and is 0"),
        ({"ttt_steps": -1}, r"ttt_steps must be at least 1, and is -1"),
        ({"timestep_skew": 0.0}, r"timestep_skew must be above 0 and at most 10, and is 0"),
        ({"motion_batch_size": 0}, r"motion_batch_size must be at least 1, and is 0"),
        ({"sampling_steps": 1001}, r"sampling_steps must be from 1 to 1000, and is 1001"),
        ({"motion_learning_rate": 0}, r"motion_learning_rate must be above 0 and at most 1, and is 0"),
        ({"dropout": 1}, r"dropout must be at least 0 and below 1, and is 1"),
        ({"guidance_scale": -2}, r"guidance_scale must be from 0 to 1000, and is -2"),
        ({"height": 60}, r"height must be positive and divisible by 8, and is 60"),
        ({"width": 0}, r"width must be positive and divisible by 8, and is 0"),
    ],
    ids=str,
)
def test_a_wrong_recipe_is_told_before_any_weights_are_read(tmp_path, change, says, monkeypatch):
    (tmp_path / "recipe.json").write_text(json.dumps({"rank": 8, "motion_layers": [1, 7]} | change))
    monkeypatch.setattr(weights.load, "_read_base", lambda source: pytest.fail("read"))
    with pytest.raises(UserError, match=rf"recipe\.json: {says}"):
        load_base(tmp_path)


@pytest.mark.parametrize(("text", "says"), [("{", "not valid JSON"), ("[1]", "should hold a JSON object, not list")])
def test_a_damaged_recipe_is_refused(tmp_path, text, says):
    (tmp_path / "recipe.json").write_text(text)
    with pytest.raises(UserError, match=rf"recipe\.json.*{says}"):
        load_base(tmp_path)


def test_a_recipe_may_name_only_what_differs(tmp_path):
    write_base(tmp_path)
    assert load_base(tmp_path, device="cpu").recipe == Recipe()
    (tmp_path / "recipe.json").write_text('{"rank": 8, "appearance_layers": [3]}')
    assert load_base(tmp_path, device="cpu").recipe == Recipe(rank=8, appearance_layers=(3,))


def test_a_recipe_comes_back_and_one_out_of_range_is_not_written(tmp_path):
    write_recipe(tmp_path, Recipe(rank=8))
    with pytest.raises(UserError, match=r"recipe\.json: rank must be"):
        write_recipe(tmp_path, Recipe(rank=0))
    assert read_recipe(tmp_path) == Recipe(rank=8)


def test_every_field_has_its_range():
    assert sorted(name for names, _, _ in RULES for name in names) == sorted(vars(Recipe()))
