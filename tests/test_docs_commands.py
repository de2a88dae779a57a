"""Every command that a document shows is one that its program takes: options, choices, targets and configuration keys.

The programs' own parsers read the commands. Nothing is run here: RUN_BY says which test runs such a command, and NEEDS
what a command needs that no test has.
"""

import argparse
import re
import runpy
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

from fastssl.config import load_config
from tests.helpers.processes import ROOT

DOCUMENTS = sorted(
    path
    for pattern in ("README.md", "CONTRIBUTING.md", "docs/**/*.md", "benchmarks/README.md")
    for path in ROOT.glob(pattern)
)
STARTS = r"(?:fastssl|python (?:-u )?(?:benchmarks/|fastssl/)\w+\.py|deepspeed|torchrun|make)"
ANY_CONFIG = ROOT / "configs/demo.yaml"  # for X.yaml, RUN/start.yaml and other made-up names
STAND_INS = {"N": "1", "H": "1"}  # numbers

# Not for a parser, with the reason.
NOT_PARSED = {
    "fastssl the training: configuration, model, losses, steps, checkpoints, evaluation": "a tree of folders",
    "fastssl COMMAND --help": "stands for every command",
    "fastssl -> pipelines -> kernels": "an order of packages",
    "fastssl -> kernels": "an order of packages",
}

# What runs such a command, by its beginning.
COMMANDS_OF_FASTSSL = {
    "bench": "tests/pipelines/bench/test_loader.py",
    "compare": "tests/integration/test_compare.py",
    "completion": "tests/fastssl/commands/test_completion.py",
    "convert": "tests/pipelines/convert/test_image_files.py",
    "doctor": "tests/fastssl/commands/test_doctor.py",
    "embed": "tests/integration/test_newcomer.py",
    "eval": "tests/integration/test_demo.py",
    "export": "tests/integration/test_newcomer.py",
    "gradflow": "tests/integration/test_analysis.py",
    "gradnorm": "tests/integration/test_analysis.py",
    "hessian": "tests/integration/test_analysis.py",
    "inspect": "tests/fastssl/commands/test_output.py",
    "launch": "tests/fastssl/commands/test_launch.py",
    "manifest": "tests/fastssl/commands/test_manifest.py",
    "neighbours": "tests/integration/test_newcomer.py",
    "report": "tests/fastssl/report/test_report.py",
    "runs": "tests/fastssl/commands/test_runs.py",
    "train": "tests/integration/test_newcomer.py",
    "verify": "tests/fastssl/commands/test_output.py",
    "views": "tests/pipelines/test_views.py",
    "--help": "tests/test_packaging.py",
}
RUN_BY = {f"fastssl {name}": test for name, test in COMMANDS_OF_FASTSSL.items()} | {
    "deepspeed": "tests/integration/test_training.py",
    "torchrun": "tests/integration/test_training.py",
    "python fastssl/train.py": "tests/integration/test_training.py",
    "make demo": "tests/integration/test_demo.py",
    "make docs": ".ci/run",
    "make lint": ".ci/run",
    "make test": ".ci/run",
}

# What no test runs, and what it needs.
NEEDS = {
    "deepspeed --hostfile": "several machines",
    "make fuzz": "minutes to hours (`make test` takes a few of its cases)",
    "make image": "docker or buildah, and a base image",
    "make install": "packages from the network (all other targets begin with it)",
    "make test-multinode": "root and iproute2",
    "make test-slow": "hours",
    "python benchmarks/": "minutes to hours, some a GPU or a data set: tests/benchmarks has small cases of each",
    "torchrun --nnodes": "several machines",
}


class Command(NamedTuple):
    document: str
    text: str
    is_inline: bool  # within a sentence: arguments may be missing


def commands_of(path: Path) -> list[Command]:
    """The commands of a document's code blocks and of its code within sentences."""
    text, document = path.read_text(), str(path.relative_to(ROOT))
    blocks = re.findall(r"^```\w*\n([\s\S]*?)^```$|^((?: {4}.*(?:\n|$))+)", text, flags=re.MULTILINE)
    found = []
    for block in (fenced or indented for fenced, indented in blocks):
        for line in block.replace("\\\n", " ").splitlines():
            if match := re.match(rf"\s*(?:\$ )?({STARTS}(?: .*)?$)", line):
                found += [Command(document, " ".join(part.split()), False) for part in parts_of(match[1])]
    prose = re.sub(r"^```\w*\n[\s\S]*?^```$|^ {4}.*$", "", text, flags=re.MULTILINE)
    for code in re.findall(rf"`({STARTS}\s[^`]+)`", prose):
        found += [Command(document, " ".join(part.split()), True) for part in parts_of(" ".join(code.split()))]
    return found


def parts_of(line: str) -> list[str]:
    """The commands of a line of shell that are ours: without comments, pipes and redirections."""
    line = re.sub(r"\s#\s.*", "", line)
    line = re.split(r"\s[|>]\s", line)[0]
    return [part for part in re.split(r"\s(?:&&|;)\s", line) if re.match(STARTS + r"\b", part)]


COMMANDS = [command for path in DOCUMENTS for command in commands_of(path)]
PARSED = sorted({command for command in COMMANDS if command.text not in NOT_PARSED})


def _incomplete_or_wrong(_: argparse.ArgumentParser, message: str) -> None:
    is_incomplete = "arguments are required" in message or "expected " in message
    raise (_Incomplete if is_incomplete else SystemExit)(2)


class Parsed(Exception):
    """A benchmark's parser has read its arguments."""


class _Incomplete(Exception):
    """An argument is missing."""


def check(words: Sequence[str], *, is_inline: bool = False) -> None:
    """Let the programs' parsers read a command; a SystemExit of 2 is an error of theirs."""
    words = [STAND_INS.get(word, word) for word in words if word != "..."]
    if words[0] == "python":
        words = [word for word in words[1:] if word != "-u"]
    if words[0] in ("deepspeed", "torchrun") and not any(word.endswith(".py") or word == "-m" for word in words):
        words += ["fastssl/train.py", "--cfg", "X.yaml"]  # a sentence on options of a launcher
    if words[0] == "fastssl":
        check_fastssl(words[1:], is_inline)
    elif words[0] == "fastssl/train.py":
        check_fastssl(["train", *words[1:]], is_inline)
    elif words[0].startswith("benchmarks/"):
        check_benchmark(words, is_inline)
    elif words[0] == "deepspeed":
        from deepspeed.launcher.runner import parse_args

        args = parse_args(words[1:])
        check([args.user_script, *args.user_args])
    elif words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        args = get_args_parser().parse_args(words[1:])
        assert args.module == (args.training_script == "fastssl.cli")
        if args.training_script != "ddp.py":  # of docs/api.md
            check(["fastssl" if args.module else args.training_script, *args.training_script_args])
    else:
        assert words[0] == "make", words
        check_make(words[1:])


def check_fastssl(words: list[str], is_inline: bool) -> None:
    from fastssl.cli import _parser
    from fastssl.commands.argument_parser import ArgumentParser

    try:
        with pytest.MonkeyPatch.context() as patch:
            if is_inline:
                patch.setattr(ArgumentParser, "error", _incomplete_or_wrong)
            args = _parser().parse_args(words)
    except _Incomplete:
        return
    except SystemExit as end:
        if end.code != 0:  # 0: --help
            raise
        return
    if hasattr(args, "launcher") and hasattr(args, "arguments"):
        check([args.launcher, *args.arguments])
        return
    if launcher := getattr(args, "launcher", None):
        check([*shlex.split(launcher), "fastssl/train.py", "--cfg", "X.yaml"])
    check_config(args)


def check_config(args: argparse.Namespace) -> None:
    """The configurations that are named, and the keys of --set, --tune and --sweep with them, or with any."""
    overrides = [each for each in getattr(args, "set", None) or [] if each != "KEY=VALUE"]
    overrides += [f"eval.what=[{name}]" for name in getattr(args, "what", None) or ()]
    for grid in [*(getattr(args, "tune", None) or ()), *(getattr(args, "sweep", None) or ())]:
        key, _, values = grid.partition("=")
        overrides += [f"{key}={value}" for value in values.split(",") if value]
    base = [config_of(path) for path in getattr(args, "base", None) or []]
    together = [config_of(path) for path in getattr(args, "cfg", None) or []]
    for one_by_one in getattr(args, "configs", None) or []:
        load_config([*base, config_of(one_by_one)])
    load_config(together or base or ANY_CONFIG)
    for override in overrides:
        load_config(together or base or ANY_CONFIG, [override])


def config_of(path: str | Path) -> Path:
    """The file that a command names, or any configuration for a made-up name."""
    path = Path(path)
    if "*" in path.name:
        assert list(ROOT.glob(str(path))), path
        return ANY_CONFIG
    is_made_up = path.parts[0] != "configs" or re.fullmatch(r"[a-zX]", path.stem)
    return ANY_CONFIG if is_made_up else ROOT / path


def check_benchmark(words: list[str], is_inline: bool) -> None:
    """Run the program up to the end of its parser."""

    def parse(parser: argparse.ArgumentParser, args: list[str] | None = None, namespace: object = None) -> None:
        del namespace
        if is_inline:
            patch.setattr(parser, "error", partial(_incomplete_or_wrong, parser))
        found, unknown = parser.parse_known_args(args)
        assert not unknown, unknown
        raise Parsed(found)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(ROOT / words[0]), *words[1:]])
        patch.syspath_prepend(ROOT / "benchmarks")
        patch.setattr(argparse.ArgumentParser, "parse_args", parse)
        with pytest.raises((Parsed, _Incomplete)) as parsed:
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    args = parsed.value.args[0]  # an incomplete command has none of these
    if hasattr(args, "cfg"):
        check_config(args)
    if hasattr(args, "row"):
        assert args.row in runpy.run_path(str(ROOT / words[0]))["ROWS"]


def check_make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for word in words:
        name, equals, _ = word.partition("=")
        known = rf"\$\((?:or \$\()?{name}\)|\$\(if \$\({name}\)" if equals else rf"^{name}:"
        assert re.search(known, makefile, flags=re.MULTILINE), f"make {word}"


@pytest.mark.parametrize("command", PARSED, ids=lambda command: f"{command.document}: {command.text}")
def test_a_documented_command_is_one_that_the_program_takes(command: Command) -> None:
    words = shlex.split(command.text)
    if command.is_inline and is_name(words):
        return
    check(words, is_inline=command.is_inline)


def is_name(words: Sequence[str]) -> bool:
    """Whether a sentence names a command that exists, without arguments."""
    from fastssl.cli import COMMANDS as MODULES

    names = {module.__name__.split(".")[-1] for module in MODULES}
    return words[0] == "fastssl" and words[1] in names and (len(words) == 2 or words[1:] == ["bench", "loader"])


def test_a_documented_command_is_run_by_a_test_or_says_what_it_needs() -> None:
    for command in PARSED:
        texts = {command.text, re.sub(r" --\S+( \d+)?(?= )", "", command.text)}  # without the options of a launcher
        starts = [start for start in (*RUN_BY, *NEEDS) if any(f"{text} ".startswith(start) for text in texts)]
        assert starts or command.text == "fastssl --help", command
    for start, test in RUN_BY.items():
        assert start.split()[-1].removesuffix(".py") in (ROOT / test).read_text(), (start, test)


def test_no_entry_is_of_the_past() -> None:
    texts = {command.text for command in COMMANDS}
    assert NOT_PARSED.keys() <= texts
    assert {start for start in (*RUN_BY, *NEEDS) if not any(f"{text} ".startswith(start) for text in texts)} == set()


def test_a_wrong_command_is_found() -> None:
    """Or the tests above would pass whatever is written."""
    for line in (
        "fastssl train photos/ --hour-limit 2",
        "deepspeed --num_gpuz 2 fastssl/train.py --cfg X.yaml",
        "torchrun --nproc_per_nodes 2 fastssl/train.py",
        "python benchmarks/reproduce.py --rows cifar10-mio-exp --data DIR",
        "fastssl launch deepspeed fastssl/train.py --cfgs X.yaml",
    ):
        with pytest.raises(SystemExit) as end:
            check(shlex.split(line))
        assert end.value.code == 2
    for line in (
        "fastssl train --cfg X.yaml --set optim.lr=1",
        "deepspeed fastssl/train.py --cfg X.yaml --set run.sed=1",
    ):
        with pytest.raises(ValueError, match="unknown key"):
            check(shlex.split(line))
    for line in (
        "make tests",
        "make demo DEMOS=runs/x",
        "python benchmarks/reproduce.py --row cifar10-mio-ex --data DIR",
    ):
        with pytest.raises(AssertionError):
            check(shlex.split(line))
