"""argparse's parser with one-line errors."""

import argparse
import itertools
import re
import sys
from typing import Any, NoReturn

from fastssl.errors import print_error
from pipelines.errors import did_you_mean


class ArgumentParser(argparse.ArgumentParser):
    """Ends at a bad argument with one line that names the nearest known one."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As in argparse, but an unknown option is reported before a missing one, and by the parser that knows it."""
        words = sys.argv[1:] if args is None else args
        if any(action.nargs == argparse.REMAINDER for action in self._actions):
            words = ()
        elif self._subparsers:
            words = words[:1]
        for word in itertools.takewhile(lambda word: word != "--", words):
            option = word.partition("=")[0]
            if re.fullmatch(r"--\S+", option) and not any(known.startswith(option) for known in self._options()):
                self._refuse(option)
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self._refuse(unknown[0])
        return found, unknown

    def error(self, message: str) -> NoReturn:
        """Print the line and exit."""
        print_error(f"{message} (see {self.prog} --help)")
        sys.exit(2)

    def _options(self) -> list[str]:
        return [option for action in self._actions for option in action.option_strings]

    def _refuse(self, argument: str) -> NoReturn:
        self.error(f"unknown argument {argument[:100]}{did_you_mean(argument, self._options())}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            hint = did_you_mean(str(value), action.choices)
            if isinstance(action, argparse._SubParsersAction) and hint:
                self.error(f"unknown command {str(value)[:100]}{hint}")
            name = "/".join(action.option_strings) or action.metavar
            self.error(f"{name} must be one of {', '.join(action.choices)}, not {str(value)[:100]}{hint}")
