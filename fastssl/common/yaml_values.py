"""Read YAML that may come from elsewhere: plain values only, within limits that no recipe comes near."""

import re
from typing import Any

import yaml

from fastssl.common.errors import quote

MAX_VALUES = 100_000  # in a file
TAG = "tag:yaml.org,2002:"  # begins the names of YAML's types
NOT_READ = ("timestamp", "binary", "set", "omap", "pairs")  # types of YAML 1.1 that no setting has
NUMBERS = {
    "int": r"[-+]?(0b[01_]+|0x[\da-fA-F_]+|0[0-7_]*|[1-9][\d_]*)",
    "float": r"[-+]?((\d[\d_]*\.[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(inf|Inf|INF))|\.(nan|NaN|NAN)",
}


class _Loader(yaml.SafeLoader):
    """Numbers, strings, true, false and null, in lists and dictionaries: no dates, sets or binary values.

    As in YAML 1.2, 1e-3 is a number, where YAML 1.1 wants 1.0e-3, and neither 2020-01-01 nor 1:30 is one.
    """

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError, OverflowError) as error:  # of a value that does not have the form of its tag
            problem = f"no value of the type {node.tag.rpartition(':')[2]} is {quote(node.value)}"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from error


_Loader.yaml_constructors = {
    tag: build
    for tag, build in yaml.SafeLoader.yaml_constructors.items()
    if tag not in [TAG + name for name in NOT_READ]
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (TAG + "timestamp", TAG + "int", TAG + "float")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _name, _pattern in NUMBERS.items():
    _Loader.add_implicit_resolver(TAG + _name, re.compile(f"({_pattern})$"), list("-+.0123456789"))


def parse_yaml(text: str) -> Any:
    """The values of a text in YAML. Raises YAMLError."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count_values(node, {})
        return loader.construct_document(node)
    except RecursionError:
        raise yaml.YAMLError("its values are nested too deeply") from None
    finally:
        loader.dispose()


def _count_values(node: yaml.Node, counts: dict[yaml.Node, int | None]) -> int:
    """The number of values in a node, with every alias replaced by what it stands for.

    Raises YAMLError for too many values (a few nested aliases stand for billions), an alias within what it stands for,
    and keys that are no names or that are there twice.

    counts: those of the nodes before; None: of the nodes around this one.
    """

    def error(problem: str, at: yaml.Node) -> yaml.YAMLError:
        return yaml.MarkedYAMLError(problem=problem, problem_mark=at.start_mark)

    if node in counts:
        before = counts[node]
        if before is None:
            raise error("an alias is within its own anchor", node)
        return before
    counts[node] = None
    count = 1
    if isinstance(node, yaml.MappingNode):
        names: set[str] = set()
        for key, value in node.value:
            if key.tag not in (TAG + "str", TAG + "merge"):
                raise error("a key is not a name", key)
            if key.value in names:
                raise error(f"the key {quote(key.value)} is there twice: leave out one of them", key)
            names.add(key.value)
            count += _count_values(value, counts)
    elif isinstance(node, yaml.SequenceNode):
        count += sum(_count_values(value, counts) for value in node.value)
    if count > MAX_VALUES:
        raise error(f"it holds more than {MAX_VALUES:,} values, counting all that aliases stand for", node)
    counts[node] = count
    return count
