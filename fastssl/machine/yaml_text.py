"""YAML of the configuration, read within limits into plain values and written.

Only mappings with text keys, lists, text, numbers, true, false and null are read. PyYAML's safe loader alone would also
build dates, sets and bytes, drop the first of two equal keys, and spend minutes on a small file: on nested aliases, on
deep nesting or on integers of thousands of digits.
"""

import math
import re
from pathlib import Path
from typing import Any

import yaml

from fastssl.errors import ConfigError
from pipelines.files import read_file

MAX_BYTES, MAX_TEXT, MAX_DIGITS = 2**20, 4096, 100  # of a file, of a text, of a number
MAX_DEPTH, MAX_NODES = 32, 10_000  # nodes after aliases are expanded
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_CORE = "tag:yaml.org,2002:"
_NUMBERS = (f"{_CORE}int", f"{_CORE}float")
_SCALARS = (f"{_CORE}str", f"{_CORE}bool", f"{_CORE}null", *_NUMBERS)


def read_yaml(path: Path) -> Any:
    """The value of a YAML file of at most MAX_BYTES; a mapping is a dict, a list is a list, without shared parts.

    Raises:
        ConfigError: The file cannot be read, or holds something else; the message names the file and the line.
    """
    try:
        content = read_file(path, MAX_BYTES)
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}") from None
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path} is not YAML: line {line} is not UTF-8; save it as UTF-8") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, name: str) -> Any:
    """The value of a YAML text; `name` stands for it in messages.

    Raises:
        ConfigError: See `read_yaml`.
    """
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else loader.to_value(node)
    except _RefusedError as error:
        raise ConfigError(f"{name}, {_place(error.problem_mark)}: {error.problem}") from None
    except yaml.MarkedYAMLError as error:
        problem = " ".join(filter(None, (error.context, error.problem)))
        raise ConfigError(f"{name} is not YAML, {_place(error.problem_mark)}: {problem[:200]}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{name} is not YAML, line {line}: a character U+{error.character:04X}") from None
    except (ValueError, OverflowError):  # PyYAML on escapes such as "\UFFFFFFFF" and on directives
        raise ConfigError(f"{name} is not YAML{f', {_place(loader.get_mark())}' if loader else ''}") from None


def dump_yaml(value: Any) -> str:
    """A value of `parse_yaml` as block-style YAML that it reads back unchanged."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)


class _RefusedError(yaml.MarkedYAMLError):
    def __init__(self, problem: str, mark: Any) -> None:
        super().__init__(problem=problem, problem_mark=mark)


class _Loader(yaml.SafeLoader):
    """Composes nodes within the limits, then turns them into plain values."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = self.num_nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._enter(self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def to_value(self, node: yaml.Node) -> Any:
        """A composed node as a plain value; aliases are expanded."""
        self.num_nodes = 0
        return self._value(node)

    def _enter(self, mark: Any) -> None:
        self.depth += 1
        self.num_nodes += 1
        if self.depth > MAX_DEPTH:
            raise _RefusedError(f"nested more than {MAX_DEPTH} levels deep", mark)
        if self.num_nodes > MAX_NODES:
            raise _RefusedError(f"more than {MAX_NODES:,} values, with aliases expanded", mark)

    def _value(self, node: yaml.Node) -> Any:
        self._enter(node.start_mark)
        if isinstance(node, yaml.MappingNode) and node.tag == f"{_CORE}map":
            value = self._mapping(node)
        elif isinstance(node, yaml.SequenceNode) and node.tag == f"{_CORE}seq":
            value = [self._value(item) for item in node.value]
        elif isinstance(node, yaml.ScalarNode) and node.tag in _SCALARS:
            value = self._scalar(node)
        else:
            kind = node.tag.removeprefix(_CORE)[:80]
            raise _RefusedError(f"a value of type {kind} is not allowed; put text in quotes", node.start_mark)
        self.depth -= 1
        return value

    def _mapping(self, node: yaml.MappingNode) -> dict[str, Any]:
        tree: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag != f"{_CORE}str":
                kind = key_node.tag.removeprefix(_CORE)[:80]
                raise _RefusedError(f"a key must be text, not of type {kind}", key_node.start_mark)
            key = self._value(key_node)
            if key in tree:
                raise _RefusedError(f"the key {key[:80]} stands twice", key_node.start_mark)
            tree[key] = self._value(value_node)
        return tree

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        text = node.value
        if len(text) > (MAX_DIGITS if node.tag in _NUMBERS else MAX_TEXT):
            raise _RefusedError(f"a value of {len(text):,} characters is too long", node.start_mark)
        if _CONTROL.search(text):
            raise _RefusedError("a text must not have line breaks or control characters", node.start_mark)
        try:
            value = self.construct_object(node)
        except (ValueError, LookupError):  # such as !!int x
            value = math.nan
        if isinstance(value, float) and not math.isfinite(value):
            raise _RefusedError(f"{text} is not a number", node.start_mark)
        return value


class _Dumper(yaml.SafeDumper):
    """Writes each part in full, and quotes text that `_Loader` would read as a number."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


# PyYAML follows YAML 1.1, where 1e-4 is text: YAML 1.2 and everyone who writes a learning rate mean a number.
_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(f"{_CORE}float", _EXPONENT, [*"-+.0123456789"])


def _place(mark: Any) -> str:
    return f"line {mark.line + 1}"
