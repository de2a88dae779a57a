"""The online probe: no gradient out of it, no label of the hold-out into it, ranks as one, resumed bitwise.

The file is also the program of a rank: `python test_probe.py RANK WORLD_SIZE FOLDER`.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fastssl.evaluation.config import EvalConfig
from fastssl.evaluation.probe import OnlineProbe

TAKEN = torch.tensor(True)


def _probe() -> OnlineProbe:
    torch.manual_seed(0)
    return OnlineProbe(12, 4, EvalConfig())


def _probe_batch() -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(0)
    y = np.arange(32) % 4
    x = (rng.normal(size=(4, 12))[y] + 0.5 * rng.normal(size=(32, 12))).astype(np.float32)
    is_holdout = torch.arange(32) % 5 == 0
    view = torch.from_numpy(x)
    return [view, view + 0.1], torch.from_numpy(y), is_holdout


def test_probe_gives_no_gradient_to_the_features():
    h, labels, is_holdout = _probe_batch()
    h = [view.requires_grad_() for view in h]
    values = _probe().step(h, labels, is_holdout, TAKEN)
    assert all(view.grad is None for view in h)
    assert not any(value.requires_grad for value in values.values())


def test_probe_ignores_the_labels_of_the_hold_out():
    h, labels, is_holdout = _probe_batch()
    poisoned = torch.where(is_holdout, (labels + 1) % 4, labels)
    clean_probe, poisoned_probe = _probe(), _probe()
    for _ in range(20):
        clean = clean_probe.step(h, labels, is_holdout, TAKEN)
        poison = poisoned_probe.step(h, poisoned, is_holdout, TAKEN)
    assert torch.equal(clean_probe.linear.weight, poisoned_probe.linear.weight)
    assert torch.equal(clean_probe.linear.bias, poisoned_probe.linear.bias)
    assert clean["online_correct"] > poison["online_correct"]


def test_probe_counts_hold_out_views_and_learns():
    h, labels, is_holdout = _probe_batch()
    probe = _probe()
    for _ in range(50):
        values = probe.step(h, labels, is_holdout, TAKEN)
    assert values["online_total"] == 2 * is_holdout.sum()
    assert values["online_correct"] >= 0.9 * values["online_total"]


def test_probe_step_is_sgd_on_the_mean_over_what_it_may_learn():
    h, labels, is_holdout = _probe_batch()
    labels = labels.clone()
    labels[:3] = -1
    probe, twin = _probe(), nn.Linear(12, 4)
    twin.load_state_dict(probe.linear.state_dict())
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    learns = ~is_holdout & (labels >= 0)
    for _ in range(3):
        probe.step(h, labels, is_holdout, TAKEN)
        optimizer.zero_grad()
        nn.functional.cross_entropy(twin(torch.cat([v[learns] for v in h])), labels[learns].repeat(2)).backward()
        optimizer.step()
    torch.testing.assert_close(probe.linear.weight, twin.weight)


def test_probe_stands_still_where_there_is_nothing_to_learn():
    h, labels, _ = _probe_batch()
    probe = _probe()
    before = probe.linear.weight.detach().clone()
    probe.step(h, labels, torch.ones(32, dtype=torch.bool), TAKEN)
    probe.step(h, torch.full_like(labels, -1), torch.zeros(32, dtype=torch.bool), TAKEN)
    assert torch.equal(probe.linear.weight, before)


def test_probe_takes_low_precision_features_in_fp32():
    h, labels, is_holdout = _probe_batch()
    probe = _probe()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        probe.step([view.bfloat16() for view in h], labels, is_holdout, TAKEN)
    twin = _probe()
    twin.step([view.bfloat16().float() for view in h], labels, is_holdout, TAKEN)
    assert torch.equal(probe.linear.weight, twin.linear.weight)


def test_probe_goes_on_from_its_saved_state_bitwise(tmp_path):
    h, labels, is_holdout = _probe_batch()
    probe = _probe()
    for _ in range(3):
        probe.step(h, labels, is_holdout, TAKEN)
    torch.save(probe.state_dict(), tmp_path / "probe.pt")
    resumed = OnlineProbe(12, 4, EvalConfig())
    resumed.load_state_dict(torch.load(tmp_path / "probe.pt", weights_only=True))
    for _ in range(3):
        probe.step(h, labels, is_holdout, TAKEN)
        resumed.step(h, labels, is_holdout, TAKEN)
    assert torch.equal(probe.linear.weight, resumed.linear.weight)


def _run_rank(rank: int, world_size: int, folder: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    h, labels, is_holdout = _probe_batch()
    rows = torch.arange(32).chunk(world_size)[rank]
    probe = _probe()
    for _ in range(3):
        probe.step([view[rows] for view in h], labels[rows], is_holdout[rows], TAKEN)
    torch.save(probe.linear.weight.detach(), folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.dist
def test_probe_on_two_ranks_is_the_probe_on_one(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__]
    ranks = [subprocess.Popen([*command, str(rank), "2", str(tmp_path)], env=environment) for rank in range(2)]
    try:
        assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
    h, labels, is_holdout = _probe_batch()
    assert is_holdout[:16].sum() != is_holdout[16:].sum(), "the hold-out must fall unevenly"
    probe = _probe()
    for _ in range(3):
        probe.step(h, labels, is_holdout, TAKEN)
    weights = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    assert torch.equal(*weights)
    torch.testing.assert_close(weights[0], probe.linear.weight.detach())


if __name__ == "__main__":
    _run_rank(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
