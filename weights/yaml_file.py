"""Tables of settings in YAML or JSON, from strangers: plain text in tables and lists, and nothing else."""

from pathlib import Path
from typing import Any

import yaml

from model.errors import UserError
from weights.files import read_text

LONGEST = 200_000  # bytes of a file of settings: two seconds of the YAML reader; a grid of forty arms has 10,000


def read_config(path: str | Path) -> dict[str, Any]:
    """Read a YAML or JSON table. Every plain value is text, except null: the settings' own types decide what it is."""
    try:
        table = yaml.load(read_text(path, LONGEST), Loader=_TextLoader)
    except OSError as error:
        raise UserError(f"{path} could not be read: {error.strerror}.") from error
    except UserError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(table, dict) or not all(isinstance(key, str) for key in table):
        raise UserError(f"{path} does not hold settings: lines such as `steps: 500` were expected.")
    return table


class _TextLoader(yaml.SafeLoader):
    """YAML without guesses: `1e-5`, `yes`, `2024-01-01` and `0123` all stay text; a key given twice is an error."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - yaml's own class attribute
        first: [(tag, pattern) for tag, pattern in resolvers if tag == "tag:yaml.org,2002:null"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    yaml_constructors = {  # noqa: RUF012 - no tag but those of text, tables and lists makes anything
        tag: yaml.SafeLoader.yaml_constructors[tag]
        for tag in (*(f"tag:yaml.org,2002:{kind}" for kind in ("null", "str", "seq", "map")), None)
    }

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):  # ten names for the line before, ten times over, fill any memory
            where = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "names of other entries (*name) are not followed", where)
        return super().compose_node(parent, index)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        pass  # `<<` is a name like any other

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep=deep)
