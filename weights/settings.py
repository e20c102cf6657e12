"""Settings of every command, one dataclass each, from flags or a YAML or JSON file or both."""

import argparse
import copy
import dataclasses
import difflib
import math
import re
import shutil
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser

from model.errors import UserError
from weights.files import write_json
from weights.yaml_file import read_config

Settings = TypeVar("Settings")

CONFIG = "a YAML or JSON file of these settings; flags win over it"
MOST_VALUES = 1000  # of a list
LONGEST_VALUE = 4096  # letters of a number, a choice or a path


def parse_settings(
    cls: type[Settings], argv: Sequence[str] | None = None, prog: str | None = None, description: str | None = None
) -> Settings:
    """Fill the dataclass `cls` from a command line, and from the file that `--config` names; flags win over the file.

    Fields of list or tuple type take several words (`--seed 1 2 3`), a bool alone means true, `null` empties a field
    that may be None. `--help` prints the docstring's `Args:` entries and leaves. Raises UserError for an unknown flag
    or key (with the nearest known one), a flag given twice, a wrong type, a missing value, an unreadable file.
    """
    return complete(cls, parse_given(cls, argv, prog, description))


def parse_given(
    cls: type,
    argv: Sequence[str] | None = None,
    prog: str | None = None,
    description: str | None = None,
    sources: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """As parse_settings, but only what was given: `complete` fills the dataclass from it.

    `sources` are further flags that, as `--config` does, name a file to take settings from, and their help; they are
    handed back unread among the rest.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if "-h" in words or "--help" in words:
        _print_help(cls, prog, description, {"config": CONFIG, **sources})
        raise SystemExit(0)
    flags = _flags({**_types(cls), **dict.fromkeys(("config", *sources), str)}, words)
    files = {name: flags.pop(name) for name in ("config", *sources) if name in flags}
    config = files.pop("config", None)
    given = {} if config is None else _checked(cls, read_config(config), f"{config}: ")
    return {**given, **_checked(cls, flags, "--"), **files}


def complete(cls: type[Settings], given: Mapping[str, Any]) -> Settings:
    """The dataclass `cls` from what parse_given handed back; raises UserError for a value that is missing."""
    return _build(cls, given, "--")


def settings_from(cls: type[Settings], mapping: Mapping[str, Any], where: str) -> Settings:
    """Fill the dataclass `cls` from a table, as parse_settings does from a file; `where` heads its error messages."""
    return _build(cls, _checked(cls, mapping, f"{where}: "), f"{where}: ")


def save_settings(path: str | Path, settings: Any) -> None:
    """Write a settings dataclass as JSON, atomically; the file serves as `--config` again."""
    write_json(path, dataclasses.asdict(settings))


def _flags(hints: Mapping[str, Any], words: list[str]) -> dict[str, Any]:
    """Split `--name word word --other=word` into names and the text given to each."""
    given: dict[str, list[str]] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            if name not in hints:
                raise UserError(_unknown(name, hints, "--"))
            if name in given:
                several = f" Several values follow one flag: --{name} A B." if _is_list(hints[name]) else ""
                raise UserError(f"--{name} was given twice; it is unclear which one counts.{several}")
            given[name] = [value] if equals else []
        elif not name:
            raise UserError(
                f"{word!r} stands alone: every value follows its flag, as in `--{next(iter(hints))} VALUE`."
            )
        else:
            given[name].append(word)
    return {name: _from_words(name, hints[name], values) for name, values in given.items()}


def _from_words(name: str, hint: Any, words: list[str]) -> Any:
    if words == ["null"] and _may_be_none(hint):
        return None
    if not words and hint is bool:
        return True
    if not words:
        raise UserError(f"--{name} needs a value: {_describe(hint)}.")
    if _is_list(hint):
        return words
    if len(words) > 1:
        raise UserError(f"--{name} takes one value and got {len(words)}: {' '.join(words)}. Put quotes around text.")
    return words[0]


def _checked(cls: type, mapping: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values with the types that `cls` declares."""
    hints = _types(cls)
    for name in mapping:
        if name not in hints:
            raise UserError(_unknown(name, hints, where))
    return {name: _typed(value, hints[name], where + name) for name, value in mapping.items()}


def _typed(value: Any, hint: Any, label: str) -> Any:
    if value is None and _may_be_none(hint):
        return None
    if get_origin(hint) is dict and isinstance(value, Mapping):
        return dict(value)  # as it is: its values are some other dataclass's, and jsonargparse would guess their types
    given = [value] if isinstance(value, str | int | float) and _is_list(hint) else value
    words = given if isinstance(given, list | tuple) else [given]
    if len(words) > MOST_VALUES:
        raise UserError(f"{label}: {len(words)} values are more than {MOST_VALUES}.")
    if _is_text(hint) and isinstance(given, list | tuple) == _is_list(hint) and all(type(w) is str for w in words):
        return list(words) if _is_list(hint) else given  # jsonargparse would read it as YAML, all it names included
    if any(isinstance(word, str) and (len(word) > LONGEST_VALUE or "*" in word) for word in words):
        raise UserError(f"{label}: expected {_describe(hint)}, got {str(value)[:200]!r}.")
    checker = ArgumentParser(exit_on_error=False)
    checker.add_argument("--value", type=hint)
    try:
        typed = checker.parse_object({"value": copy.deepcopy(given)}).value
    except argparse.ArgumentError:
        typed = None
    if typed is None or (isinstance(typed, float) and not math.isfinite(typed)):
        raise UserError(f"{label}: expected {_describe(hint)}, got {value!r}.")
    return typed


def _build(cls: type[Settings], values: Mapping[str, Any], where: str) -> Settings:
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if field.init and required and field.name not in values:
            raise UserError(f"{where}{field.name} is missing: {_describe(_types(cls)[field.name])}.")
    return cls(**values)


def _unknown(name: str, known: Mapping[str, Any], where: str) -> str:
    near = difflib.get_close_matches(str(name).replace("-", "_"), known, n=2, cutoff=0.6)
    flag = "--" if where == "--" else ""
    hint = f" Did you mean {' or '.join(flag + other for other in near)}?" if near else f" Known: {', '.join(known)}."
    return f"{where}{name} is not a setting.{hint}"


def _types(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def _options(hint: Any) -> tuple[Any, ...]:
    """The types a hint allows, None left out."""
    union = get_origin(hint) in (Union, types.UnionType)
    return tuple(option for option in get_args(hint) if option is not types.NoneType) if union else (hint,)


def _may_be_none(hint: Any) -> bool:
    return types.NoneType in get_args(hint)


def _is_list(hint: Any) -> bool:
    return any(get_origin(option) in (list, tuple) for option in _options(hint))


def _is_text(hint: Any) -> bool:
    """Is the type `str`, or a list of it, or one of them or None?"""
    return all(option in (str, list[str]) for option in _options(hint))


def _describe(hint: Any) -> str:
    """The type in words: "one or more whole numbers"."""
    words = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        Path: "a path",
        dict: "a table",
    }
    plural = {int: "whole numbers", float: "numbers", str: "texts", Path: "paths"}

    def one(option: Any) -> str:
        if get_origin(option) in (list, tuple):
            return f"one or more {plural.get(get_args(option)[0], 'values')}"
        if get_origin(option) is Literal:
            return f"one of {', '.join(map(str, get_args(option)))}"
        return words.get(get_origin(option) or option, str(option))

    return " or ".join(map(one, _options(hint)))


def _print_help(cls: type, prog: str | None, description: str | None, sources: Mapping[str, str]) -> None:
    hints = {**dict.fromkeys(sources, Path), **_types(cls)}
    unless = "".join(f", unless --{name} is given" for name in sources if name != "config")  # what has it all already

    class Formatter(argparse.HelpFormatter):
        """Flag, value and default on one line where they fit, without types in Python's words."""

        def __init__(self, prog: str, **options: Any) -> None:
            width = min(110, shutil.get_terminal_size().columns)
            super().__init__(prog, **{**options, "max_help_position": 28, "width": width})

        def _format_action_invocation(self, action: argparse.Action) -> str:
            hint = hints.get(action.dest)
            values = "{true,false}" if action.default is True else _metavar(hint)
            return f"--{action.dest} {values}".rstrip() if hint else ", ".join(action.option_strings)

        def _get_help_string(self, action: argparse.Action) -> str:
            value = action.default
            words = " ".join(map(str, value if isinstance(value, list | tuple) else [value]))
            shown = value if isinstance(value, bool) else value not in (None, "", [], (), {})
            default = f" (default: {words})" if action.dest in hints and shown else ""
            end = f" (required{unless})" if action.required else default
            return (re.sub(r"(?<!\.)\.$", "", action.help or "") + end).replace("%", "%%")

    usage = "%(prog)s [--config FILE] [--FLAG VALUE ...]"
    parser = ArgumentParser(prog=prog, usage=usage, description=description, formatter_class=Formatter)
    for name, about in sources.items():
        parser.add_argument(f"--{name}", help=about)
    parser.add_class_arguments(cls, as_group=False)
    parser.print_help()


def _metavar(hint: Any) -> str:
    option = _options(hint)[0]
    if get_origin(option) is Literal:
        return "{" + ",".join(map(str, get_args(option))) + "}"
    if get_origin(option) in (list, tuple):
        return _metavar(get_args(option)[0]) + " ..."
    return {int: "N", float: "X", bool: "", Path: "FILE", dict: "{...}"}.get(get_origin(option) or option, "TEXT")
