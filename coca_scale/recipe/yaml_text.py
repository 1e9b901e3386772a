"""YAML by the core rules of version 1.2, in which `no` is a word and `010` is ten.

PyYAML reads by version 1.1, where words, clock times and dates turn into booleans, numbers and days
behind a user's back. Its merge key `<<` is kept, as recipes may have it.
"""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml.constructor import ConstructorError

_TAG = "tag:yaml.org,2002:"
_NULL = re.compile(r"(?:~|null|Null|NULL|)\Z")
_BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z")
_INT = re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z")
_FLOAT = re.compile(
    r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
)
# in the order in which they are tried: tag, pattern, first characters
_CORE = (
    ("null", _NULL, ["~", "n", "N", ""]),
    ("bool", _BOOL, list("tTfF")),
    ("int", _INT, list("-+0123456789")),
    ("float", _FLOAT, list("-+0123456789.")),
)
_LINE_ENDS = re.compile("[\x85\u2028\u2029]")
_MOST_DIGITS = 100
_MOST_REPEATED = 100_000  # parts of a file that aliases stand for


class _Loader(yaml.SafeLoader):
    """Plain data of the core rules, and nothing else."""

    def get_single_node(self) -> yaml.Node | None:
        """The content of the file before it is made into objects; here it is looked through."""
        node: yaml.Node | None = super().get_single_node()
        if node is not None:
            _look_through(node)
        return node


class _Dumper(yaml.SafeDumper):
    """Puts in quotes what either version would take for something else than the text it is.

    That is done for words and numbers by the rules below; line ends beside `\\n` are written out.
    """

    def ignore_aliases(self, _: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        """A text, in quotes that write such line ends as escapes."""
        node: yaml.ScalarNode = super().represent_str(data)
        if _LINE_ENDS.search(data):
            node.style = '"'
        return node


def parse_yaml(text: str) -> Any:
    """Plain data: dicts, lists, texts, numbers, booleans and None.

    Raises:
        yaml.YAMLError: not YAML, a key that is there twice, a tag, or aliases without end.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # _Loader is a SafeLoader
    except RecursionError as error:
        raise yaml.YAMLError("nested too deeply") from error


def dump_yaml(content: Any) -> str:
    """Plain data as YAML, which by either version of it reads back equal."""
    text: str = yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


def complaint(error: yaml.YAMLError) -> str:
    """What is wrong with a text, and in which line."""
    if isinstance(error, yaml.MarkedYAMLError):
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        mark = error.problem_mark or error.context_mark
        return f"line {mark.line + 1}: {problem}" if mark is not None else problem
    return " ".join(str(error).split())


def _look_through(root: yaml.Node) -> None:
    """Refuse keys that are there twice, and aliases that stand for more than a file can mean."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: yaml.Node) -> int:
        """Nodes below this one, those behind aliases counted wherever they are named."""
        if id(node) in sizes:
            return sizes[id(node)]
        if id(node) in open_nodes:
            raise ConstructorError(None, None, "an alias inside of what it names", node.start_mark)
        open_nodes.add(id(node))
        found = 1
        if isinstance(node, yaml.MappingNode):
            _refuse_twins(node)
            found += sum(size(key) + size(value) for key, value in node.value)
        elif isinstance(node, yaml.SequenceNode):
            found += sum(map(size, node.value))
        open_nodes.discard(id(node))
        sizes[id(node)] = found
        return found

    if size(root) - len(sizes) > _MOST_REPEATED:
        problem = f"aliases repeat more than {_MOST_REPEATED:,} parts"
        raise ConstructorError(None, None, problem, root.start_mark)


def _refuse_twins(node: yaml.MappingNode) -> None:
    seen = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            if (key.tag, key.value) in seen:
                raise ConstructorError(
                    None, None, f"the key {key.value} is there twice", key.start_mark
                )
            seen.add((key.tag, key.value))


def _scalar(node: yaml.ScalarNode, kind: str, pattern: re.Pattern[str]) -> str:
    """Text of a scalar, which a tag may have called something that it is not."""
    text: str = node.value
    if not isinstance(node, yaml.ScalarNode) or not pattern.match(text):
        raise ConstructorError(None, None, f"{text!r:.60} is no {kind}", node.start_mark)
    return text


def _null(_: _Loader, node: yaml.ScalarNode) -> None:
    _scalar(node, "null", _NULL)


def _bool(_: _Loader, node: yaml.ScalarNode) -> bool:
    return _scalar(node, "bool", _BOOL).lower() == "true"


def _int(_: _Loader, node: yaml.ScalarNode) -> int:
    text = _scalar(node, "int", _INT)
    if len(text) > _MOST_DIGITS:
        raise ConstructorError(None, None, f"a number of {len(text)} digits", node.start_mark)
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


def _float(_: _Loader, node: yaml.ScalarNode) -> float:
    text = _scalar(node, "float", _FLOAT)
    return float(text.replace(".", "", 1) if text[-1] in "fFnN" else text)


_Dumper.add_representer(str, _Dumper.represent_str)
_Loader.yaml_implicit_resolvers = {}
_Loader.yaml_constructors = {
    f"{_TAG}null": _null,
    f"{_TAG}bool": _bool,
    f"{_TAG}int": _int,
    f"{_TAG}float": _float,
    f"{_TAG}str": yaml.SafeLoader.construct_yaml_str,
    f"{_TAG}seq": yaml.SafeLoader.construct_yaml_seq,
    f"{_TAG}map": yaml.SafeLoader.construct_yaml_map,
    None: yaml.SafeLoader.construct_undefined,
}
for _kind, _pattern, _first in _CORE:
    _Loader.add_implicit_resolver(f"{_TAG}{_kind}", _pattern, _first)
    _Dumper.add_implicit_resolver(f"{_TAG}{_kind}", _pattern, _first)
_Loader.add_implicit_resolver(f"{_TAG}merge", re.compile(r"<<\Z"), ["<"])
