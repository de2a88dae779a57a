"""Damaged and edited run folders: each is resumed and read rightly, or refused with one line."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastssl.checkpoint.checksums import MANIFEST, _digest, save_file, write_manifest
from fastssl.checkpoint.save_load import load_objective_state, load_weights
from fastssl.config import build_config
from fastssl.errors import UserError
from fastssl.evaluation.config import EvalConfig
from fastssl.evaluation.probe import OnlineProbe
from fastssl.losses import Mio
from fastssl.processes.launch import started_process
from fastssl.processes.preemption import StopRequest
from fastssl.tracking.run_folder import RunFolder
from fastssl.tracking.writers import drop_rows_after, read_rows
from fastssl.trainer import Trainer
from pipelines.batch import Batch
from tests.helpers.fuzz import cases, mutate_file, mutate_json, mutate_tree, num_cases

pytestmark = pytest.mark.timeout(300 + num_cases() // 2)

FILES = ("state.pt", "rank_0.pt", "weights.pt", MANIFEST)
STEPS = (2, 4)
WRONG_TENSORS = (torch.zeros(1), torch.zeros(2, 3), torch.zeros(0), torch.tensor(1.0), torch.zeros(3).to_sparse())


@dataclass
class Run:
    """A training after two checkpoints, and what each of them holds."""

    trainer: Trainer
    folder: Path
    states: dict[int, dict[str, Tensor]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("fuzz") / "run"
    cfg = build_config(
        {
            "run": {"dir": str(folder), "device": "cpu", "num_threads": 1, "checkpoint_every_steps": 2},
            "data": {"global_batch_size": 8},
            "views": {"size_px": 12},
            "model": {"projector_hidden": [8], "projector_dim": 4},
            "optim": {"warmup_epochs": 0},
            "train": {"num_epochs": 3},
        }
    )
    torch.manual_seed(0)
    ids = torch.arange(8)
    batches = [Batch(views=list(torch.randn(2, 8, 3, 12, 12)), labels=ids % 2, sample_ids=ids) for _ in range(3)]
    layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    parts: dict[str, Any] = {"model": nn.Sequential(*layers), "loss": Mio(), "loader": batches}
    with started_process(cfg.run) as process, StopRequest() as request:
        probe = OnlineProbe(6, 2, EvalConfig())
        trainer = Trainer(cfg, **parts, probe=probe, is_holdout=ids % 4 == 3)
        trainer.start(process, request)
        states = {}
        trainer.epoch_stats.timer.start()
        for step in range(1, max(STEPS) + 1):
            trainer.take_step(trainer.loader._finish(batches[step % 3], 0))  # pyright: ignore
            if step in STEPS:
                trainer.save()
                states[step] = weights_of(trainer)
        trainer.epoch_stats.close()
        yield Run(trainer, folder, states)


def weights_of(trainer: Trainer) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in trainer.objective.state_dict().items()}


def resume(run: Run, folder: Path) -> int:
    """Resume the copy of a run, from weights that are no numbers; the step it goes on from."""
    trainer = run.trainer
    for parameter in trainer.objective.parameters():
        parameter.data.fill_(torch.nan)
    trainer.folder, trainer.step = RunFolder(folder), 0
    trainer.restore()
    return trainer.step


def checkpoint(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step_{step:08d}"


def damage(folder: Path, rng: np.random.Generator) -> None:
    """Damage one to three files of the checkpoints; the checksums tell."""
    for _ in range(int(rng.integers(1, 4))):
        step = STEPS[-1] if rng.integers(3) else STEPS[0]
        path = checkpoint(folder, step) / FILES[int(rng.integers(len(FILES)))]
        if path.is_file():
            mutate_file(path, rng)


def edit_manifest(folder: Path, rng: np.random.Generator) -> None:
    """Change one value of a manifest, and its digest with it."""
    path = checkpoint(folder, STEPS[-1]) / MANIFEST
    content = json.loads(path.read_bytes())
    del content["sha256_of_the_above"]
    content = json.loads(mutate_json(json.dumps(content).encode(), rng))
    if isinstance(content, dict):
        content["sha256_of_the_above"] = _digest(content)
    path.write_text(json.dumps(content))


def edit_state(folder: Path, rng: np.random.Generator) -> None:
    """Take out one node of a file of tensors, or put something else there; checksums are those of the new file."""
    place = checkpoint(folder, STEPS[-1])
    manifest = json.loads((place / MANIFEST).read_bytes())
    name = FILES[int(rng.integers(2))]
    tree = torch.load(place / name, weights_only=True)
    odd = (*WRONG_TENSORS, None, -1, 10**6, 2.5, "x", [], {})
    manifest["files"][name] = save_file(mutate_tree(tree, rng, odd), place / name)
    write_manifest(place, manifest["files"], world_size=1, run=manifest["run"])


def swap(folder: Path, rng: np.random.Generator) -> None:
    """Exchange two files of the checkpoints, or the checkpoints themselves."""
    places = [checkpoint(folder, step) for step in STEPS]
    if rng.integers(2):
        names = rng.choice(FILES, 2)
        paths = [places[int(rng.integers(2))] / names[0], places[1] / names[1]]
    else:
        paths = places
    aside = folder / "aside"
    paths[0].rename(aside)
    if paths[1].exists():
        paths[1].rename(paths[0])
    aside.rename(paths[1])


def edit_run(folder: Path, rng: np.random.Generator) -> None:
    mutate_file(folder / "run.json", rng)


@pytest.mark.parametrize(
    "change", [damage, edit_manifest, edit_state, swap, edit_run], ids=lambda change: change.__name__
)
def test_a_run_is_resumed_from_a_whole_checkpoint_or_refused(
    change: Callable[[Path, np.random.Generator], None], run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for case in cases(f"resume after {change.__name__}", fraction=0.1):
        folder = tmp_path / "run"
        shutil.copytree(run.folder, folder)
        change(folder, case.rng)
        with case.guarded():
            assert_resumed_or_refused(run, folder, capfd)
        shutil.rmtree(folder)


def assert_resumed_or_refused(run: Run, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    try:
        step = resume(run, folder)
    except UserError as error:
        assert_short(error)
        return
    warnings = capfd.readouterr().err.splitlines()
    aside = len(list((folder / "checkpoints").glob("damaged_*")))
    assert len(warnings) == aside, warnings
    assert all(line.startswith("fastssl: warning: ") for line in warnings), warnings
    if step == 0:  # both are gone
        assert not list((folder / "checkpoints").iterdir())
        return
    assert (step == STEPS[-1]) == (not aside)
    assert_equal(weights_of(run.trainer), run.states[step])


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []


def assert_short(error: UserError) -> None:
    assert 0 < len(" ".join(str(error).split())) < 1000


@pytest.mark.parametrize("has_manifest", [False, True])
def test_weights_are_the_saved_ones_or_refused(has_manifest: bool, run: Run, tmp_path: Path) -> None:
    whole = checkpoint(run.folder, STEPS[-1])
    expected = load_weights(whole)
    for case in cases(f"weights.pt {'with' if has_manifest else 'without'} manifest", fraction=0.16):
        folder = tmp_path / "copy"
        folder.mkdir()
        for name in ("weights.pt", "state.pt", *([MANIFEST] if has_manifest else [])):
            shutil.copy(whole / name, folder)
        mutate_file(folder / "weights.pt", case.rng)
        if has_manifest:
            mutate_file(folder / "state.pt", case.rng)
        with case.guarded():
            assert_read_or_refused(folder, expected, run.states[STEPS[-1]], has_manifest)
        shutil.rmtree(folder)


def assert_read_or_refused(
    folder: Path, expected: dict[str, Any], state: dict[str, Tensor], has_manifest: bool
) -> None:
    try:
        found = load_weights(folder)
    except UserError as error:
        assert_short(error)
    else:
        for part in ("backbone", "projector"):
            assert_equal(found.pop(part), expected[part])
        assert all(value == expected[key] for key, value in found.items())
    if not has_manifest:
        return
    try:
        assert_equal(load_objective_state(folder), state)
    except UserError as error:
        assert_short(error)


def test_rows_of_metrics_are_kept(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step, "epoch": step // 3, "loss": 1 / step}).encode() for step in range(1, 9)]
    for case in cases("metrics.jsonl", fraction=0.2):
        path = tmp_path / f"{case.seed}.jsonl"
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        if case.rng.integers(2):
            odd, place = lines.copy(), int(case.rng.integers(len(lines)))
            others = (b"[1, 2]", b"{}", b'{"step": null}', b"\xff\0\xfe", b"[" * 100_000)
            which = int(case.rng.integers(2 * len(others)))
            odd[place] = others[which] if which < len(others) else mutate_json(lines[place], case.rng)
            path.write_bytes(b"".join(line + b"\n" for line in odd))
        else:
            mutate_file(path, case.rng)
        with case.guarded():
            if path.is_dir():
                with pytest.raises(UserError, match="not a regular file"):
                    read_rows(path)
            else:
                assert_no_row_is_lost(path, set(lines))


def assert_no_row_is_lost(path: Path, lines: set[bytes]) -> None:
    before = path.read_bytes().split(b"\n") if path.exists() else []
    rows = read_rows(path, "step")
    assert len(rows) >= sum(line in lines for line in before)
    drop_rows_after(path, 5)
    after = path.read_bytes().split(b"\n")
    dropped = [row for row in map(_row, set(before) - set(after)) if not (row and row["step"] > 5)]
    assert dropped in ([], [None]), f"{dropped}: only a last line that a kill has cut off may go"
    assert [line for line in before if line in lines and json.loads(line)["step"] <= 5] == [
        line for line in after if line in lines
    ]


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None
