"""Settings from flags and files: what they become, and what is refused."""

import json
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import yaml

from model.errors import UserError
from weights.settings import parse_given, parse_settings, read_config, save_settings, settings_from


@dataclass(frozen=True)
class Shared:
    """What every stage is told.

    Args:
        base: the model to start from: a folder, or a file (.safetensors, .ckpt), whose name may be long enough to
            need a second line.
        seed: one or several seeds; 100 % of them are used.
    """

    base: str = "tiny"
    seed: list[int] = field(default_factory=lambda: [0])


@dataclass(frozen=True)
class Example(Shared):
    """Learn something.

    Args:
        out: where to.
        prompt: what it shows.
        lora: LoRAs and strengths.
        layers: which layers.
        learning_rate: step size.
        steps: how many.
        preview: write previews.
        gradient_checkpointing: less memory, more time.
        vae: another VAE.
        dtype: number format.
    """

    out: str = ""
    prompt: list[str] = field(default_factory=list)
    lora: list[str] = field(default_factory=list)
    layers: tuple[int, ...] | None = None
    learning_rate: float = 5e-5
    steps: int = 500
    preview: bool = True
    gradient_checkpointing: bool = False
    vae: str | None = None
    dtype: Literal["auto", "fp32"] = "auto"


@dataclass(frozen=True)
class Needy:
    """Needs a value.

    Args:
        out: where to.
        start: seconds.
        table: settings of a step: images, prompt, ...
    """

    out: str
    start: float = 0.0
    table: dict[str, Any] = field(default_factory=dict)


def parse(*words):
    return parse_settings(Example, words, prog="customttt example", description="Learn something from one video.")


def written(tmp_path, text, name="run.yaml"):
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


def test_nothing_given_means_the_defaults():
    assert parse() == Example()


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("--seed 1 -2 3", "seed", [1, -2, 3]),
        ("--layers 2 6", "layers", (2, 6)),
        ("--layers=2", "layers", (2,)),
        ("--layers null", "layers", None),
        ("--lora runs/teddy:1.0 2024 null", "lora", ["runs/teddy:1.0", "2024", "null"]),
        ("--out 2024", "out", "2024"),
        ("--out 1e3", "out", "1e3"),
        ("--out null", "out", "null"),
        ("--out=--odd", "out", "--odd"),
        ("--vae 0123", "vae", "0123"),
        ("--vae [1]", "vae", "[1]"),
        ("--learning_rate 1e-5", "learning_rate", 1e-5),
        ("--learning_rate 1", "learning_rate", 1.0),
        ("--steps 7", "steps", 7),
        ("--gradient_checkpointing", "gradient_checkpointing", True),
        ("--preview false", "preview", False),
        ("--dtype fp32", "dtype", "fp32"),
    ],
)
def test_a_flag_becomes_a_value_of_the_fields_type(words, name, value):
    found = getattr(parse(*words.split()), name)
    assert found == value
    assert type(found) is type(value)


def test_words_with_spaces_are_values_of_their_own():
    assert parse("--prompt", "a bear: 2", "- a [man]").prompt == ["a bear: 2", "- a [man]"]


def test_a_file_is_typed_by_the_fields_and_flags_win_over_it(tmp_path):
    config = written(
        tmp_path,
        "learning_rate: 1e-5\nout: 0123\nvae: 2024-01-01\nseed: 4\nlayers: [2, 5]\nlora: [runs/1, 2024]\n"
        "prompt: a bear\nsteps: 3\npreview: no\ndtype: fp32\n",
    )
    expected = Example(
        learning_rate=1e-5, out="0123", vae="2024-01-01", seed=[4], layers=(2, 5), lora=["runs/1", "2024"],
        prompt=["a bear"], steps=9, preview=False, dtype="fp32",
    )  # fmt: skip
    assert parse("--config", config, "--steps", "9") == expected


def test_null_in_a_file_empties_only_what_may_be_empty(tmp_path):
    assert parse("--config", written(tmp_path, "vae:\nlayers: null\n")).layers is None
    with pytest.raises(UserError, match=r"run\.yaml: steps: expected a whole number, got None"):
        parse("--config", written(tmp_path, "steps:\n"))


def test_saved_settings_are_a_config_that_gives_them_back(tmp_path):
    settings = Example(
        out="null", vae="1990", layers=(2, 6), learning_rate=1e-5, prompt=["a: b", "yes", "ein Bär"], lora=["1e5"]
    )
    save_settings(tmp_path / "settings.json", settings)
    assert json.loads((tmp_path / "settings.json").read_text())["layers"] == [2, 6]
    assert parse("--config", str(tmp_path / "settings.json")) == settings
    save_settings(tmp_path / "settings.json", Example())
    assert parse("--config", str(tmp_path / "settings.json")) == Example()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--stps 3", r"--stps is not a setting. Did you mean --steps\?"),
        ("--learning-rate 3", r"Did you mean --learning_rate\?"),
        ("--xyzzy 3", "--xyzzy is not a setting. Known: base, seed, out"),
        ("--steps 1 --seed 2 --steps 3", "--steps was given twice"),
        ("--lora a --lora b", "--lora was given twice.*--lora A B"),
        ("--steps=1 --steps=1", "--steps was given twice"),
        ("--steps a", "--steps: expected a whole number, got 'a'"),
        ("--steps 1.5", "--steps: expected a whole number"),
        ("--steps true", "--steps: expected a whole number"),
        ("--steps 1 2", "--steps takes one value and got 2: 1 2"),
        ("--steps", "--steps needs a value: a whole number"),
        ("--steps null", "--steps: expected a whole number"),
        ("--seed 1 b", r"--seed: expected one or more whole numbers, got \['1', 'b'\]"),
        ("--layers", "--layers needs a value: one or more whole numbers"),
        ("--learning_rate nan", "--learning_rate: expected a number"),
        ("--learning_rate .inf", "--learning_rate: expected a number"),
        ("--out a teddy bear", "--out takes one value and got 3: a teddy bear. Put quotes"),
        ("--dtype fp8", "--dtype: expected one of auto, fp32, got 'fp8'"),
        ("--preview maybe", "--preview: expected true or false"),
        ("teddy --steps 3", "'teddy' stands alone"),
        ("--config nothing.yaml", r"nothing\.yaml could not be read: No such file"),
    ],
)
def test_a_wrong_flag_is_one_clear_line(words, message):
    with pytest.raises(UserError, match=message) as caught:
        parse(*words.split())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stps: 3", r"run\.yaml: stps is not a setting. Did you mean steps\?"),
        ("steps: a", r"run\.yaml: steps: expected a whole number, got 'a'"),
        ("steps: 1\nsteps: 2", "'steps' is given twice"),
        ("lora: [[a]]", r"run\.yaml: lora: expected one or more texts"),
        ("lora: [null]", r"run\.yaml: lora: expected one or more texts"),
        ("out: {a: 1}", r"run\.yaml: out: expected text"),
        ("- a\n- b", "does not hold settings"),
        ("", "does not hold settings"),
        ("a: [", "not valid YAML"),
        ("out: !!python/object/apply:os.system [echo]", "not valid YAML"),
        ("[" * 5000, "not valid YAML"),
    ],
)
def test_a_wrong_file_is_one_clear_line(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as caught:
        parse("--config", written(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_value_without_default_is_asked_for():
    with pytest.raises(UserError, match="--out is missing: text"):
        parse_settings(Needy, [])
    with pytest.raises(UserError, match=r"teddy\.yaml: motion: out is missing"):
        settings_from(Needy, {}, "teddy.yaml: motion")


def test_a_section_of_a_file_is_checked_like_a_file_of_its_own(tmp_path):
    table = read_config(written(tmp_path, "base: 15\nmotion: {steps: 1e2, seed: [3]}\nttt: {steps: 30}\n"))
    assert settings_from(Example, {"base": table["base"], **table["ttt"]}, "x") == Example(base="15", steps=30)
    with pytest.raises(UserError, match=r"teddy\.yaml: motion: steps: expected a whole number, got '1e2'"):
        settings_from(Example, table["motion"], "teddy.yaml: motion")
    with pytest.raises(UserError, match="teddy: motion is not a setting"):
        settings_from(Example, table, "teddy")
    assert settings_from(Example, {"steps": 3, "layers": (1,)}, "python") == Example(steps=3, layers=(1,))


def test_a_table_inside_a_file_stays_text_until_its_own_fields_type_it(tmp_path):
    """As `customttt run` reads it."""
    config = written(tmp_path, "out: x\ntable: {out: 0123, learning_rate: 1e-5, vae: '[1]', layers: [2, 6]}\n")
    table = parse_settings(Needy, ["--config", config]).table
    assert settings_from(Example, table, "x") == Example(out="0123", learning_rate=1e-5, vae="[1]", layers=(2, 6))
    with pytest.raises(UserError, match="table: expected a table, got 'text'"):
        parse_settings(Needy, ["--config", written(tmp_path, "out: x\ntable: text\n")])


def test_every_plain_value_of_a_file_is_text(tmp_path):
    """The oracle is YAML's own guess: all but null would have been turned into something else."""
    text = "{a: 1e3, b: yes, c: 0123, d: 2024-01-01, e: 12:30:00, f: 1.50, g: null, h: '~', i: ~}"
    assert read_config(written(tmp_path, text)) == {
        "a": "1e3", "b": "yes", "c": "0123", "d": "2024-01-01", "e": "12:30:00", "f": "1.50", "g": None, "h": "~",
        "i": None,
    }  # fmt: skip
    assert not {"yes", "0123", "1.50"} & set(map(str, yaml.safe_load(text).values()))


def test_help_says_what_is_required_and_that_nought_is_a_default(capsys):
    with pytest.raises(SystemExit):
        parse_settings(Needy, ["-h"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--out TEXT where to (required) --start X seconds (default: 0.0)" in text
    assert text.endswith("--table {...} settings of a step: images, prompt, ...")
    with pytest.raises(SystemExit):
        parse_given(Needy, ["-h"], sources={"from": "a clip"})
    assert "where to (required, unless --from is given)" in " ".join(capsys.readouterr().out.split())


def test_help_shows_each_field_with_its_docstring_and_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as ended:
        parse("--steps", "3", "--help")
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "usage: customttt example [--config FILE] [--FLAG VALUE ...]",
        "Learn something from one video.",
        "whose name may be long enough to need a second line (default: tiny)",
        "--seed N ... one or several seeds; 100 % of them are used (default: 0)",
        "--layers N ... which layers --learning_rate X step size (default: 5e-05)",
        "--preview {true,false} write previews (default: True)",
        "--gradient_checkpointing less memory, more time --vae TEXT another VAE",
        "--dtype {auto,fp32} number format (default: auto)",
    ):
        assert part in text
    for noise in ("print_config", "lora+", "Optional", "type:", "null", "(default: )"):
        assert noise not in text
