"""Damaged and edited manifests, rows files and sidecars of shards."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from fastssl.cli import main
from pipelines.errors import DataError
from pipelines.shards.manifest import Manifest, Shard
from tests.helpers.fuzz import ODD_VALUES, cases, mutate_bytes, mutate_file, mutate_tree, num_cases
from tests.helpers.shards import contents, write_shards

pytestmark = pytest.mark.timeout(300 + num_cases() // 2)

ODD = (*ODD_VALUES, 2**62, 2**62 + 1, -(2**63), "x.beton", "/x.beton", "a/../../x.beton", "a\0.beton", "\ud800.beton")
SHARDS = tuple(Shard(f"{k}.beton", 10 + k, 9_000, 500, 4, f"{k:064x}", f'"{k}"', (8, 12)) for k in range(3))
WHOLE = Manifest(SHARDS, ["cat", "dog", "\u202e"], [9, 7, 1])


def edit_json(data: bytes, rng: np.random.Generator) -> bytes:
    return json.dumps(mutate_tree(json.loads(data), rng, ODD)).encode()


def test_manifests() -> None:
    """A manifest that was changed is one line, or it is that of the same data set."""
    whole = WHOLE.to_json()
    for case in cases("manifest", fraction=1):
        text = (edit_json if case.rng.integers(2) else mutate_bytes)(whole, case.rng)
        with case.guarded(seconds=5, memory_mb=512):
            try:
                found, message = Manifest.from_json(text, "dataset.json"), ""
            except DataError as error:
                found, message = None, str(error)
        assert (found is None) == bool(message)
        assert message.isprintable()
        assert len(message) < 600
        if found is not None:
            assert found.identity == WHOLE.identity
            assert Manifest.from_json(found.to_json(), "dataset.json") == found


@pytest.fixture(scope="module")
def whole_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.beton.writer.PAGE_BYTES", 4096)
        write_shards(folder, class_names=["a", "b", "c"])
    assert main(["manifest", str(folder)]) == 0
    return folder


def test_data_sets(whole_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever is damaged, the command ends with one line, or writes what describes the files as they are."""
    for case in cases("data set", fraction=0.3):
        folder = tmp_path / "set"
        shutil.copytree(whole_folder, folder)
        files = sorted(folder.iterdir())
        mutate_file(files[int(case.rng.integers(len(files)))], case.rng)
        before = contents(folder)
        with case.guarded():
            capsys.readouterr()
            checked = main(["manifest", str(folder), "--check"]), capsys.readouterr()
            assert contents(folder) == before
            written = main(["manifest", str(folder)]), capsys.readouterr()
        for code, said in (checked, written):
            assert (code, said.err.count("\n")) in ((0, 0), (2, 1)), said.err
            assert all(line.isprintable() for line in (said.out + said.err).split("\n"))
        if written[0] == 0:
            assert main(["manifest", str(folder), "--check"]) == 0
        else:
            assert contents(folder).get("dataset.json") == before.get("dataset.json")
        shutil.rmtree(folder)
