"""JSON or YAML -> values, for files that people write by hand and others send.

Both mean the same here: YAML has the scalars of its version 1.2, no key is given twice, and nothing grows beyond what
is written.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Hashable
from typing import Any

import yaml

from lora_core.data.json_values import shown, whole_number

MOST_NESTED = 20


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars (`2e-4` is a number, `no` is text, `010` is ten), no key given twice, and nothing that grows
    beyond what is written: blocks do not nest deep, and an alias stands for a scalar.
    """

    # PyYAML's own, replaced rather than added to
    yaml_implicit_resolvers = {}  # noqa: RUF012
    yaml_constructors = {  # noqa: RUF012
        tag: construct
        for tag, construct in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in ("str", "seq", "map")
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        begins: Any = event.start_mark
        if self._depth > MOST_NESTED:
            raise yaml.composer.ComposerError(None, None, f"it nests more than {MOST_NESTED} deep", begins)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent) and not isinstance(node, yaml.ScalarNode):
            what = f"*{event.anchor} stands for more than one value; write them out"
            raise yaml.composer.ComposerError(None, None, what, begins)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value if node.id == "mapping" else ():  # `!!map x` is refused below
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _first)


def _scalar(read: Callable[[str], object]) -> Callable[[yaml.SafeLoader, Any], object]:
    """Return a constructor; what was tagged by hand may be anything."""

    def construct(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> object:
        value = loader.construct_scalar(node)
        try:
            return read(value)
        except (ValueError, KeyError):
            problem = f"{shown(value)!r} is not what {node.tag.rpartition(':')[2]} means"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None

    return construct


for _tag, _read in (
    ("null", lambda text: {"": None, "~": None, "null": None}[text.lower()]),
    ("bool", lambda text: {"true": True, "false": False}[text.lower()]),
    ("int", whole_number),
    ("float", float),
):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _scalar(_read))


def parse(text: str) -> object:
    """Return the values that a text spells.

    Raises:
        ValueError: it is neither JSON nor YAML, with line and column.
    """
    if text.lstrip().startswith("{"):
        # YAML reads most of JSON, but neither tabs nor pairs of surrogates. What is not JSON either gets YAML's error.
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(text, object_pairs_hook=_once, parse_constant=str, parse_int=whole_number)
    try:
        return _loaded(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{where}this is not valid YAML: {error.problem}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ValueError(f"line {line}: this is not valid YAML: {str(error).splitlines()[0]}") from None


def _loaded(text: str) -> object:
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    except (ValueError, OverflowError):  # of "\\UFFFFFFFF"
        raise yaml.scanner.ScannerError(None, None, "there is no such character", loader.get_mark()) from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key is given twice")
    return values
