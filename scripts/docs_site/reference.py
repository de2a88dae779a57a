"""The reference pages, from the docstrings and signatures in the source, which is read and not imported.

Only the command line's parser is imported, which needs none of a training's packages. Docstrings are plain text with
`names` in backticks, so they are not read as Markdown.
"""

import argparse
import ast
import html
import os
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import griffe

SECTIONS = {  # section of a configuration -> its class
    "run": "fastssl.config.RunConfig",
    "data": "pipelines.loader.DataConfig",
    "views": "pipelines.views.ViewsConfig",
    "model": "fastssl.models.config.ModelConfig",
    "optim": "fastssl.optim.config.OptimConfig",
    "train": "fastssl.config.TrainConfig",
    "eval": "fastssl.evaluation.config.EvalConfig",
}
METHODS = {"Trainer": ("train",)}  # the others are the order of events of a run
HIDDEN = ("self", "cls")


def write_reference(root: Path, folder: Path) -> list[str]:
    """Write the pages; returns their entries of the navigation."""
    loader = griffe.GriffeLoader(search_paths=[root], docstring_parser="google")
    packages = {name: loader.load(name) for name in ("fastssl", "pipelines", "kernels")}
    loader.resolve_aliases(implicit=True, external=False)
    find = _Finder(packages)
    pages = {
        "fastssl": ("fastssl", _package(find)),
        "losses": ("fastssl.losses", _losses(find)),
        "functional": ("fastssl.functional", _functional(find)),
        "errors": ("Errors", _errors(find)),
        "configuration": ("Keys of a configuration", _configuration(find, root)),
        "commands": ("Options of the commands", _commands(root)),
    }
    folder.mkdir(parents=True)
    for name, (title, parts) in pages.items():
        (folder / f"{name}.md").write_text("\n\n".join([f"# {title}", *parts]) + "\n")
    return [f"{title}: docs/reference/{name}.md" for name, (title, _) in pages.items()]


class _Finder:
    def __init__(self, packages: dict[str, griffe.Object]) -> None:
        self.packages = packages

    def __call__(self, path: str) -> griffe.Object:
        """The object of a dotted path, behind all imports."""
        package, _, rest = path.partition(".")
        found = self.packages[package][rest] if rest else self.packages[package]
        return found.final_target if found.is_alias else found


# -- pages


def _package(find: _Finder) -> Iterator[str]:
    package = find("fastssl")
    yield "[Python API](../api.md) shows all of these at work."
    for name in sorted(package.exports or ()):
        found = package[name]
        found = found.final_target if found.is_alias else found
        if found.is_module:
            continue  # a page of its own
        yield from _documented(found, f"fastssl.{name}", 2)


def _losses(find: _Finder) -> Iterator[str]:
    module = find("fastssl.losses")
    yield "[losses.md](../losses.md) has the sources, [concepts.md](../concepts.md) the equations of MIO and MINC."
    yield from _documented(find("fastssl.losses.Loss"), "fastssl.losses.Loss", 2)
    classes = [element.split(".")[-1] for element in re.findall(r"\w+", str(module["CLASSES"].value))]
    shown: set[str] = set()
    for name in classes:
        cls = find(f"fastssl.losses.{name}")
        home = cls.module
        if home.path not in shown:
            shown.add(home.path)
            yield f"## {home.name}"
            yield f"`loss.name`: {', '.join(f'`{each}`' for each in _names(home))}"
            yield _plain(home)
        yield from _documented(cls, f"fastssl.losses.{name}", 3)
        for config in _configs(home):
            yield f"### `fastssl.losses.{config.name}`"
            yield from _text(config)
            yield _fields(config)


def _names(home: griffe.Object) -> list[str]:
    """Values of `loss.name` that a module declares."""
    return [ast.literal_eval(str(cls.members["name"].value)) for cls in _configs(home)]


def _configs(home: griffe.Object) -> list[griffe.Object]:
    return [cls for cls in home.classes.values() if not cls.is_alias and cls.name.endswith("Config")]


def _functional(find: _Finder) -> Iterator[str]:
    module = find("fastssl.functional")
    yield _plain(module)
    for name in module.exports or ():
        wrapped = re.fullmatch(r"_over_all_ranks\((\w+)\)", str(module[name].value))
        assert wrapped, f"fastssl.functional.{name} is not made by _over_all_ranks"
        operator = find(f"fastssl.functional.{wrapped[1]}")
        yield f"## {operator.module.name}"
        yield _plain(operator.module)
        yield from _documented(operator, f"fastssl.functional.{name}", 3, replaced={"exchange": "EXCHANGE"})


def _errors(find: _Finder) -> Iterator[str]:
    yield _plain(find("fastssl.errors"))
    for module in ("fastssl.errors", "pipelines.errors"):
        for cls in find(module).classes.values():
            yield from _documented(cls, f"{module}.{cls.name}", 2)


def _configuration(find: _Finder, root: Path) -> Iterator[str]:
    yield (
        "A file of a configuration has these sections; `--set section.key=value` sets one key. An unknown key is an "
        "error. The keys of `loss:` are the fields of [the loss's configuration](losses.md); `ds:` is passed to "
        "DeepSpeed ([training](../training.md#zero-offload-and-deepspeeds-own-keys)). A resumed run may change the "
        "keys marked with \\*."
    )
    for section, path in SECTIONS.items():
        cls = find(path)
        yield f"## {section}"
        yield from _text(cls)
        yield _fields(cls)
    yield "## Fields of a view"
    yield "For `views.override`, and for each of `views.specs`: `size_px`, and the fields of these augmentations."
    for path in sorted((root / "kernels/augment/ops").glob("*.py")):
        source = path.read_text()
        declared = re.search(r"^    fields=(\{.*?\}),$", source, flags=re.MULTILINE | re.DOTALL)
        if declared and not path.stem.startswith(("_", "base")):
            yield f"### {path.stem}"
            yield prose(ast.get_docstring(ast.parse(source)) or "")
            yield f"```python\n{textwrap.dedent('    ' + declared[1])}\n```"


def _commands(root: Path) -> Iterator[str]:
    sys.path.insert(0, str(root))
    os.environ["COLUMNS"] = "100"
    from fastssl.cli import _parser

    yield "What `--help` prints. [The command line](../command_line.md) explains exit codes, tables and `--json`."
    for name, command in _sub_commands(_parser()):
        for path, parser in [(name, command), *((f"{name} {sub}", each) for sub, each in _sub_commands(command))]:
            yield f"## `fastssl {path}`"
            yield f"```text\n{parser.format_help()}```"


def _sub_commands(parser: argparse.ArgumentParser) -> list[tuple[str, argparse.ArgumentParser]]:
    found = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [(name, each) for choices in found for name, each in choices.items()]


# -- parts


def _documented(found: griffe.Object, path: str, level: int, replaced: dict[str, str] | None = None) -> Iterator[str]:
    """Heading, signature and docstring of a function or a class, with its public methods."""
    yield f"{'#' * level} `{path}`"
    if found.is_function:
        yield _signature(path.split(".")[-1], found.parameters, found.returns, replaced or {})
        yield from _text(found)
        return
    bases = ", ".join(str(base) for base in found.bases)
    if "__init__" in found.members:
        start = found.members["__init__"]
        yield _signature(path.split(".")[-1], start.parameters, None, {})
        yield from _text(found)
        yield from _text(start)
    else:
        yield f"```python\nclass {found.name}({bases})\n```"
        yield from _text(found)
    for name, method in found.members.items():
        is_public = not name.startswith("_") and name in METHODS.get(found.name, (name,))
        if is_public and not method.is_alias and method.is_function and method.docstring:
            yield f"{'#' * (level + 1)} `{found.name}.{name}`"
            yield _signature(name, method.parameters, method.returns, {})
            yield from _text(method)


def _signature(name: str, parameters: griffe.Parameters, returns: object, replaced: dict[str, str]) -> str:
    parts, is_keyword = [], False
    for each in parameters:
        if each.name in HIDDEN:
            continue
        kind = each.kind
        if kind is griffe.ParameterKind.keyword_only and not is_keyword:
            parts.append("*")
            is_keyword = True
        star = {griffe.ParameterKind.var_positional: "*", griffe.ParameterKind.var_keyword: "**"}.get(kind, "")
        is_keyword |= star == "*"
        text = f"{star}{each.name.lstrip('*')}" + (f": {each.annotation}" if each.annotation is not None else "")
        if not star and each.default is not None:
            text += f" = {replaced.get(each.name, each.default)}"
        parts.append(text)
    result = f" -> {returns}" if returns is not None else ""
    line = f"{name}({', '.join(parts)}){result}"
    if len(line) > 100:
        line = f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){result}"
    return f"```python\n{line}\n```"


def _text(found: griffe.Object) -> Iterator[str]:
    """The docstring: its text, then its arguments, results and errors."""
    for section in found.docstring.parse("google", warnings=False) if found.docstring else ():
        kind = section.kind.value
        if kind == "text":
            yield prose(section.value)
        elif kind == "attributes" and "dataclass" in found.labels:
            continue  # with the fields
        elif kind in ("parameters", "attributes", "returns", "yields", "raises"):
            title = {"parameters": "Arguments"}.get(kind, kind.capitalize())
            yield f"**{title}**"
            yield "\n".join(f"- {_entry(each, kind)}" for each in section.value)
        else:
            yield prose(section.title or "")


def _entry(each: griffe.DocstringElement, kind: str) -> str:
    name = str(each.annotation).strip("()") if kind == "raises" else getattr(each, "name", "")
    description = prose(" ".join(each.description.split()))
    return f"`{name}`: {description}" if name else description


def _fields(config: griffe.Object) -> str:
    """The fields of a dataclass as a table."""
    about: dict[str, str] = {}
    for section in config.docstring.parse("google", warnings=False) if config.docstring else ():
        if section.kind.value == "attributes":
            for each in section.value:
                for name in each.name.split(", "):
                    about[name] = " ".join(each.description.split())
    rows = ["| key | type | default | allowed | |", "|---|---|---|---|---|"]
    for name, field in config.members.items():
        if not field.is_attribute or field.is_alias or field.annotation is None or "ClassVar" in str(field.annotation):
            continue
        default, within, is_free = _declared(str(field.value))
        cells = [_code(name) + (" \\*" if is_free else ""), _code(str(field.annotation)), _code(default), within]
        rows.append("| " + " | ".join([*cells, prose(about.get(name, "")).replace("\n", " ")]) + " |")
    return "\n".join(rows)


def _declared(value: str) -> tuple[str, str, bool]:
    """Default, interval and whether a resumed run may change it, of a field's value in the source."""
    call = ast.parse(value, mode="eval").body
    if not isinstance(call, ast.Call):
        return value, "", False
    options = {option.arg: option.value for option in call.keywords}
    if ast.unparse(call.func) == "field":
        return f"{ast.unparse(options['default_factory'])}()", "", False
    within = call.args[1].value if len(call.args) > 1 and isinstance(call.args[1], ast.Constant) else ""
    return ast.unparse(call.args[0]), _code(str(within)), "free" in options


def _code(text: str) -> str:
    return f"<code>{html.escape(text).replace('|', '&#124;')}</code>" if text else ""


def _plain(found: griffe.Object) -> str:
    """A docstring as it is in the source."""
    return f"```text\n{found.docstring.value}\n```" if found.docstring else ""


def prose(text: str) -> str:
    """Plain text as Markdown: what is in backticks or indented is code, and nothing else has a meaning."""
    result = []
    for line in text.splitlines():
        if line.startswith("    ") or not line.strip():
            result.append(line)
            continue
        parts = re.split(r"(`[^`]+`)", line)
        marker = re.match(r"- ", parts[0])
        escaped = [part if i % 2 else re.sub(r"([\\*_<>\[\]|#$])", r"\\\1", part) for i, part in enumerate(parts)]
        result.append("".join(escaped) if not marker else "- " + "".join(escaped)[2:])
    return "\n".join(result)
