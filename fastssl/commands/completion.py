"""`fastssl completion`: print a script with which a shell completes commands, options, choices and files."""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastssl.commands.options import Commands, add_command

_FILES = ("SRC", "FILE", "IMAGES", "IMAGE", "WEIGHTS")  # metavars of arguments that also take other words
SHELLS = ("bash", "zsh", "tcsh")
_HOW = """\
bash:  fastssl completion bash > ~/.local/share/bash-completion/completions/fastssl
zsh:   fastssl completion zsh > ~/.zfunc/_fastssl      (~/.zfunc is in fpath, before compinit)
tcsh:  fastssl completion tcsh > ~/.fastssl.tcsh       (and in ~/.tcshrc: source ~/.fastssl.tcsh)
"""


def add_parser(commands: Commands) -> None:
    """Add the command to the command line."""
    completion = add_command(commands, "completion", "print a script that completes commands and options in a shell")
    completion.formatter_class = argparse.RawDescriptionHelpFormatter
    completion.epilog = _HOW
    completion.add_argument("shell", choices=SHELLS, metavar="SHELL", help=f"one of {', '.join(SHELLS)}")
    completion.set_defaults(call=_completion)


def _completion(args: argparse.Namespace) -> None:
    import shtab

    for action in _actions_of(args.root):
        if (files := _files_of(action)) is not None:
            action.complete = files  # pyright: ignore[reportAttributeAccessIssue] # shtab reads it
    print(shtab.complete(args.root, args.shell))


def _actions_of(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """The arguments of a parser and of its sub-commands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from _actions_of(child)
        else:
            yield action


def _files_of(action: argparse.Action) -> dict[str, Any] | None:
    """Which files complete an argument, from its metavar (X.beton, RUN, FOLDER, ...) and type; None: none."""
    import shtab

    metavar = action.metavar if isinstance(action.metavar, str) else ""
    if metavar in ("RUN", "FOLDER", "FOLDER|URL", "OUT"):
        return shtab.DIRECTORY
    if found := re.match(r"\w+\.(beton|yaml)\b", metavar):
        return shtab.glob(*{"beton": ("*.beton",), "yaml": ("*.yaml", "*.yml")}[found[1]])
    return shtab.FILE if action.type is Path or metavar in _FILES else None
