"""Damaged and edited sidecars."""

import numpy as np
import pytest

from pipelines.beton import BetonReader
from pipelines.beton.sidecar import read_sidecar
from pipelines.convert import convert
from pipelines.errors import DataError
from tests.helpers.fuzz import cases, mutate_bytes, mutate_json, num_cases

pytestmark = pytest.mark.timeout(300 + num_cases() // 2)


def test_sidecars(tmp_path):
    """A sidecar that was changed is not taken for that of a finished conversion, unless the change does not matter."""
    np.savez(tmp_path / "x.npz", x=np.zeros((3, 4, 5), np.uint8), y=np.arange(3))
    source, out = str(tmp_path / "x.npz"), tmp_path / "x.beton"
    convert("npz", source, out)
    sidecar = tmp_path / "x.beton.json"
    whole, images = sidecar.read_bytes(), out.read_bytes()
    for case in cases("sidecar", fraction=1):
        sidecar.write_bytes((mutate_json if case.rng.integers(2) else mutate_bytes)(whole, case.rng))
        with case.guarded():
            try:
                convert("npz", source, out, resume=True)
                names, message = read_sidecar(sidecar).get("class_names"), ""
                assert BetonReader(out).class_names == names
            except DataError as error:
                names, message = None, str(error)
        assert all(isinstance(name, str) for name in names or [])
        assert not message or ("x.beton" in message and message.isprintable())
        assert out.read_bytes() == images
