"""What an argument of `--lora` may say, and what is said of one that makes no sense."""

from contextlib import suppress
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model import UserError
from weights import LoRAArgument, parse_lora, split_strength
from weights.strengths import parse_constant

NUMBERS = st.floats(allow_nan=False, allow_infinity=False)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Where the files jog, run#2 and odd:0.8 are."""
    for name in ("jog", "run#2", "odd:0.8", "odd"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("argument", "path", "expected"),
    [
        ("jog", "jog", {}),
        ("jog:0.8", "jog", {"strength": 0.8}),
        ("jog:-1e-1", "jog", {"strength": -0.1}),
        ("jog: .5", "jog", {"strength": 0.5}),
        ("jog:0.8@0.0-0.6", "jog", {"strength": 0.8, "stop": 0.6}),
        ("jog:1@2.5e-1-1", "jog", {"start": 0.25}),
        ("jog:2=0.5,6=1.0", "jog", {"strength": 1.0, "layers": {2: 0.5, 6: 1.0}}),
        ("jog:6=-2, 2=1@0.2-1", "jog", {"strength": -2.0, "layers": {2: 1.0, 6: -2.0}, "start": 0.2}),
        ("jog#motion", "jog", {"adapter": "motion"}),
        ("jog#motion:0.8@0-0.5", "jog", {"adapter": "motion", "strength": 0.8, "stop": 0.5}),
        ("run#2", "run#2", {}),
        ("run#2:0.5", "run#2", {"strength": 0.5}),
        ("run#2#motion:0.5", "run#2", {"adapter": "motion", "strength": 0.5}),
        ("odd:0.8", "odd:0.8", {}),
        ("odd:0.8#motion", "odd:0.8", {"adapter": "motion"}),
        ("odd:0.8:0.5", "odd:0.8", {"strength": 0.5}),
        # not there, or not yet: a run's own folders are made after its settings are read
        ("runs/ttt", "runs/ttt", {}),
        ("runs/ttt:0.8", "runs/ttt", {"strength": 0.8}),
        ("runs/ttt#motion:0.8@0-0.5", "runs/ttt", {"adapter": "motion", "strength": 0.8, "stop": 0.5}),
        ("runs/a:b", "runs/a:b", {}),
        ("C:/runs/x", "C:/runs/x", {}),
        ("C:\\runs\\x:-1", "C:\\runs\\x", {"strength": -1.0}),
        ("C#/x", "C#/x", {}),
        (":0.8", ":0.8", {}),
    ],
)
def test_an_argument_is_a_path_an_adapter_and_a_strength(argument, path, expected):
    assert parse_lora(argument) == LoRAArgument(argument, path, **expected)


@pytest.mark.parametrize("path", ["jog", "jog#motion", "runs/none"])
@pytest.mark.parametrize(
    ("strength", "said"),
    [
        ("0,8", "'0,8' is not a finite number"),
        ("nan", "'nan' is not a finite number"),
        ("-inf", "'-inf' is not a finite number"),
        ("1e999", "'1e999' is not a finite number"),
        ("0.8@0.6", "'0.6' is not a range"),
        ("0.8@", "'' is not a range"),
        ("0.8@0-nan", "'0-nan' is not a range"),
        ("0.8@-0.5-0.5", "the range -0.5-0.5 leaves 0"),
        ("0.8@0-1.01", "the range 0-1.01 leaves 0"),
        ("0.8@0.6-0.2", "the range 0.6-0.2 is reversed"),
        ("0.8@0.5-0.5", "the range 0.5-0.5 is empty"),
        ("9=1", "'9=1' names none of the layers 0 to 8"),
        ("2=1,-1=1", "'-1=1' names none of the layers 0 to 8"),
        ("2=1,0.5", "'0.5' names none of the layers 0 to 8"),
        ("2=1,", "'' names none of the layers 0 to 8"),
        ("2=1,6=1,2=0", "layer 2 is there twice"),
        ("2=inf", "'inf' is not a finite number"),
    ],
)
def test_a_strength_that_makes_no_sense_is_named_with_both_readings(path, strength, said):
    with pytest.raises(UserError) as raised:
        parse_lora(f"{path}:{strength}")
    assert str(raised.value).startswith(
        f"{path}:{strength} does not exist, and cannot be {path} with a strength: {said}"
    )


def test_a_text_behind_a_file_that_is_there_is_meant_as_its_strength():
    with pytest.raises(UserError, match=r"jog:abc does not exist.*'abc' is not a finite number; expected is .*:0\.8"):
        parse_lora("jog:abc")


@given(NUMBERS, st.lists(NUMBERS, min_size=2, max_size=2, unique=True), st.dictionaries(st.integers(0, 8), NUMBERS))
def test_whatever_is_written_is_read_back(strength, ends, layers):
    start, stop = sorted(abs(end) % 1.0 for end in ends)
    amount = ",".join(f"{layer}={value!r}" for layer, value in layers.items()) or repr(strength)
    span = f"@{start!r}-{stop!r}" if start < stop else ""
    its = parse_lora(f"runs/x{'#m' if layers else ''}:{amount}{span}")
    assert (its.path, its.adapter) == ("runs/x", "m" if layers else None)
    assert its.scale == (layers or strength)
    assert (its.start, its.stop) == ((start, stop) if span else (0.0, 1.0))


@given(st.text("jog#:/.@=,-+e0189 naif", max_size=12))
def test_any_text_is_an_argument_or_an_error_for_people(text):
    with suppress(UserError):
        its = parse_lora(text)
        assert text.startswith(its.path)
        assert (its.path == text) == (its == LoRAArgument(text, text))


@pytest.mark.parametrize("steps", [1, 3, 7, 25, 50])
def test_a_step_is_on_where_it_begins_within_the_range(steps):
    for start in range(10):
        for stop in range(start + 1, 11):
            its = parse_lora(f"jog:1@{start / 10}-{stop / 10}")
            for step in range(steps):
                on = Fraction(start, 10) <= Fraction(step, steps) < Fraction(stop, 10)
                assert its.on(step, steps) == on


@pytest.mark.parametrize("argument", ["jog", "jog:0.5", "run#2:0.5", "jog:1@0-1"])
def test_one_number_is_taken_everywhere(argument):
    its = parse_lora(argument)
    assert parse_constant(argument) == its
    assert split_strength(argument) == (its.path, its.strength)


def test_more_than_a_number_is_refused_where_a_strength_stays():
    for parse in (parse_constant, split_strength):
        with pytest.raises(UserError, match=r"range of denoising \(@0-0\.6\) is for `customttt generate`"):
            parse("jog:0.8@0-0.6")
        with pytest.raises(UserError, match="strengths by layer are for `customttt generate`"):
            parse("jog:2=1")
    assert parse_constant("jog#motion:0.5").adapter == "motion"
    with pytest.raises(UserError, match="leave #motion away"):
        split_strength("jog#motion:0.5")
