"""`fastssl completion`, in the shells that this machine has."""

import shutil
import subprocess
from pathlib import Path

import pytest

from fastssl.cli import main


@pytest.fixture
def script(tmp_path, capfd):
    def write(shell: str) -> Path:
        assert main(["completion", shell]) == 0
        path = tmp_path / f"fastssl.{shell}"
        path.write_text(capfd.readouterr().out)
        return path

    return write


@pytest.fixture
def completed(script, tmp_path):
    """What bash offers for the last word of a command line, in a folder with some files."""
    place = tmp_path / "place"
    (place / "runs").mkdir(parents=True)
    for name in ("photos.beton", "demo.yaml", "part.yml", "notes.txt"):
        (place / name).touch()
    path = script("bash")

    def complete(*words: str) -> set[str]:
        program = f"""
source {path}
[[ $(complete -p fastssl) == *" -F _shtab_fastssl fastssl" ]] || exit 3
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
_shtab_fastssl
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
        command = ["bash", "--norc", "-c", program, "bash", "fastssl", *words]
        done = subprocess.run(command, cwd=place, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return set(done.stdout.split())

    return complete


def test_bash_completes_commands_options_choices_and_files(completed):
    assert {"train", "convert", "eval", "runs", "completion"} <= completed("")
    assert completed("comp") == {"compare", "completion"}
    assert {"--what", "--on", "--json", "--wide"} <= completed("eval", "--")
    assert completed("eval", "runs", "--wi") == {"--wide"}
    assert completed("convert", "--from", "p") == {"parquet"}
    assert completed("bench", "") == {"loader"}
    assert completed("completion", "") == {"bash", "zsh", "tcsh"}
    assert completed("train", "--cfg", "") == {"demo.yaml", "part.yml", "runs"}
    assert completed("inspect", "p") == {"photos.beton"}
    assert completed("eval", "") == {"runs"}
    assert completed("inspect", "photos.beton", "--out", "n") == {"notes.txt"}
    assert completed("embed", "n") == completed("neighbours", "x.parquet", "n") == {"notes.txt"}
    assert completed("train", "--init", "n") == {"notes.txt"}
    assert completed("train", "--run", "") == {"runs"}
    assert completed("export", "x.pt", "") == {"runs"}
    assert completed("export", "n") == {"notes.txt"}
    assert completed("embed", "--device", "c") == {"cpu", "cuda"}
    assert "--local_rank" not in completed("train", "--")


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells_have_a_script_that_names_all_commands(shell, script):
    path = script(shell)
    assert all(f"{name}" in path.read_text() for name in ("gradflow", "completion", "loader"))
    if shell == "zsh" and (zsh := shutil.which("zsh")):
        subprocess.run([zsh, "-n", path], check=True)


def test_an_unknown_shell_is_refused(capfd):
    with pytest.raises(SystemExit, match="2"):
        main(["completion", "zhs"])
    assert "did you mean zsh" in capfd.readouterr().err
