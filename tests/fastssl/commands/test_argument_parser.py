"""The command line's errors: one line that names the nearest known command, option, choice or key."""

import pytest

from fastssl import cli
from fastssl.cli import COMMANDS, main
from fastssl.commands.argument_parser import ArgumentParser
from fastssl.config import build_config
from fastssl.errors import ConfigError


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["trian", "--cfg", "x.yaml"], "unknown command trian: did you mean train"),
        (["evl"], "unknown command evl: did you mean eval?"),
        (["bench", "loder"], "unknown command loder: did you mean loader?"),
        (["--verison"], "unknown argument --verison: did you mean --version?"),
        (["train", "--cgf", "x.yaml"], "unknown argument --cgf: did you mean --cfg"),
        (["eval", "--jsno", "runs/a"], "did you mean --json"),
        (["convert", "--from", "foldr", "a", "b.beton"], "not foldr: did you mean folder?"),
        (["train", "a", "--from", "digits"], "--from must be one of folder, csv, webdataset, parquet, npz, not digits"),
        (["embed", "a", "--device", "cdua"], "--device must be one of auto, cpu, cuda, not cdua: did you mean cuda"),
        (["bench", "loader", "a", "--device", "gpu"], "--device must be one of auto, cpu, cuda, not gpu"),
    ],
)
def test_the_nearest_known_word_is_named(arguments, hint, capfd):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    out, err = capfd.readouterr()
    assert hint in err
    assert (out, err.count("\n")) == ("", 1)


@pytest.mark.parametrize(
    ("tree", "hint"),
    [
        ({"optim": {"name": "sgdd"}}, "did you mean sgd?"),
        ({"eval": {"what": ["knnn"]}}, "did you mean knn?"),
        ({"views": {"recipe": "simclrr"}}, "did you mean simclr"),
        ({"loss": {"name": "mioo"}}, "did you mean mio"),
        ({"run": {"drr": "x"}}, "unknown key run.drr: did you mean dir?"),
    ],
)
def test_values_and_keys_of_a_configuration(tree, hint):
    with pytest.raises(ConfigError) as refused:
        build_config(tree)
    assert hint in str(refused.value)


def test_a_shortened_option_is_taken(capfd):
    with pytest.raises(SystemExit, match="0"):
        main(["--vers"])
    assert "fastssl" in capfd.readouterr().out


def test_each_command_has_the_file_of_its_name():
    parser = ArgumentParser(prog="fastssl")
    commands = parser.add_subparsers()
    for command in COMMANDS:
        command.add_parser(commands)
    assert list(commands.choices) == [command.__name__.rpartition(".")[2] for command in COMMANDS]
    assert cli.COMMANDS[0].__name__ == "fastssl.commands.train"
