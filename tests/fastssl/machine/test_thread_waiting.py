"""Threads of torch's operations sleep while they wait, in commands that did not import torch before."""

import sys
from pathlib import Path

import pytest

from fastssl.machine.thread_waiting import let_threads_sleep


@pytest.mark.parametrize("own", [{"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "9"}, {"KMP_BLOCKTIME": "0"}])
def test_a_setting_of_the_user_stays(own: dict[str, str]) -> None:
    variables = dict(own)
    let_threads_sleep(variables)
    assert variables == own


def test_openmp_has_read_it(tiny_config: Path, command, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library prints its settings when torch loads it."""
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_DISPLAY_ENV", "verbose")
    settings = ["data.train=/no/such.beton", "run.device=cpu"]
    done = command(sys.executable, "fastssl/train.py", "--cfg", tiny_config, "--set", *settings)
    assert "/no/such.beton" in done.stderr
    assert "GOMP_SPINCOUNT = '0'" in done.stderr, done.stderr
