"""Damaged and edited sidecars."""

import json

import numpy as np
import pytest

from fastssl.cli import main
from pipelines.beton import BetonReader
from pipelines.beton.sidecar import read_sidecar
from pipelines.convert import convert
from pipelines.errors import DataError
from tests.helpers.fuzz import ODD_VALUES, cases, mutate_bytes, mutate_tree, num_cases

pytestmark = pytest.mark.timeout(300 + num_cases() // 2)


def nested(depth: int) -> list:
    return [nested(depth - 1)] if depth else []


ODD = (*ODD_VALUES, nested(14), nested(15), nested(200), [0] * (1 << 17), {"x": "\x1b[2J\n"}, ["\ud800", "\u202e"])


def edit_json(data: bytes, rng: np.random.Generator) -> bytes:
    return json.dumps(mutate_tree(json.loads(data), rng, ODD)).encode()


def test_sidecars(tmp_path, capsys):
    """A sidecar that was changed is not taken for that of a finished conversion, unless the change does not matter."""
    np.savez(tmp_path / "x.npz", x=np.zeros((3, 4, 5), np.uint8), y=np.arange(3))
    source, out = str(tmp_path / "x.npz"), tmp_path / "x.beton"
    convert("npz", source, out)
    sidecar = tmp_path / "x.beton.json"
    whole, images = sidecar.read_bytes(), out.read_bytes()
    for case in cases("sidecar", fraction=1):
        sidecar.write_bytes((edit_json if case.rng.integers(2) else mutate_bytes)(whole, case.rng))
        with case.guarded():
            try:
                convert("npz", source, out, resume=True)
                names, message = read_sidecar(sidecar).get("class_names"), ""
                assert BetonReader(out).class_names == names
            except DataError as error:
                names, message = None, str(error)
            capsys.readouterr()
            code, said = main(["inspect", str(out)]), capsys.readouterr()
        assert all(isinstance(name, str) for name in names or [])
        assert not message or ("x.beton" in message and message.isprintable())
        assert out.read_bytes() == images
        assert (code, said.err.count("\n")) in ((0, 0), (2, 1)), said.err
        assert all(line.isprintable() for line in (said.out + said.err).split("\n"))
