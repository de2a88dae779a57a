"""Options that several commands share offer what the packages take."""

from typing import get_args

from fastssl.cli import _parser
from fastssl.commands.options import INFERRED_KINDS, SOURCE_KINDS
from fastssl.embedding.images import KINDS
from pipelines.convert.sources import SourceKind


def choices_of(option: str, *command: str) -> tuple[str, ...]:
    parser = _parser()
    for name in command:
        parser = parser._subparsers._group_actions[0].choices[name]
    return tuple(parser._option_string_actions[option].choices)


def test_the_kinds_of_sources_are_those_that_are_read():
    assert get_args(SourceKind) == SOURCE_KINDS == choices_of("--from", "convert")
    assert choices_of("--from", "embed") == KINDS
    assert set(INFERRED_KINDS) == set(SOURCE_KINDS) - {"torchvision", "digits"}
    assert choices_of("--from", "train") == INFERRED_KINDS


def test_devices_are_offered_alike():
    assert choices_of("--device", "embed") == choices_of("--device", "bench", "loader") == ("auto", "cpu", "cuda")
