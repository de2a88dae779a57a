"""The diagnostics, against their definitions on whole matrices in fp64."""

import math

import pytest
import torch
from torch.nn import functional as F

from fastssl.tracking.representation import (
    COLLAPSE_THRESHOLDS,
    NUM_BINS,
    add_sums,
    effective_rank,
    power_law_exponent,
    representation_metrics,
    update_alarm,
    window_sums,
)


def made(num: int = 96, num_features: int = 24, width: int = 12, num_views: int = 2, seed: int = 0):
    """Features and projections of V similar views, of a spectrum that falls."""
    generator = torch.Generator().manual_seed(seed)

    def views(dim: int, noise: float) -> list[torch.Tensor]:
        scale = torch.arange(1, dim + 1, dtype=torch.float64) ** -0.5
        sample = torch.randn(num, dim, generator=generator, dtype=torch.float64) * scale + 0.1
        return [
            sample + noise * torch.randn(num, dim, generator=generator, dtype=torch.float64) for _ in range(num_views)
        ]

    return views(num_features, 0.05), views(width, 0.1)


def of_windows(h, z, num_steps: int) -> dict[str, float]:
    """In several steps, as a training has them."""
    total = {}
    for part in range(num_steps):
        total = add_sums(
            total, window_sums([x.chunk(num_steps)[part] for x in h], [x.chunk(num_steps)[part] for x in z])
        )
    return representation_metrics(total, len(z))


def entropy_rank(values: torch.Tensor) -> float:
    p = values / values.sum()
    return math.exp(-sum(x * math.log(x) for x in p.tolist() if x > 0))


@pytest.mark.parametrize("num_views", [2, 4])
def test_figures_are_their_definitions(num_views):
    h, z = made(num_views=num_views)
    found = of_windows(h, z, 1)
    u = [F.normalize(x, dim=1) for x in z]
    rows, features = torch.cat(u), torch.cat(h)
    assert found["rankme_h"] == pytest.approx(entropy_rank(torch.linalg.svdvals(features)), rel=1e-6)
    assert found["rankme_z"] == pytest.approx(entropy_rank(torch.linalg.svdvals(rows)), rel=1e-6)
    assert found["std_z"] == pytest.approx(float(rows.std(0, correction=0).mean()) * math.sqrt(12), rel=1e-9)
    pairs = [(v, w) for v in range(num_views) for w in range(v)]
    distances = torch.stack([(u[v] - u[w]).square().sum(1).mean() for v, w in pairs])
    assert found["alignment_z"] == pytest.approx(float(distances.mean()), rel=1e-9)
    apart = torch.cdist(u[0], u[1]).square()
    others = apart[~torch.eye(96, dtype=torch.bool)]
    assert found["uniformity_z"] == pytest.approx(float((-2 * others).exp().mean().log()), rel=1e-9)
    assert found["similarity_gap"] == pytest.approx(float((others.mean() - distances.mean()) / 2), rel=1e-9)

    stacked = torch.stack(u, 1)
    middle = stacked.mean(1)
    between = torch.cov(middle.T, correction=0)
    within = sum(torch.einsum("nvi,nvj->ij", x, x) for x in [stacked - middle[:, None]]) / (96 * num_views)
    root = torch.linalg.inv(torch.linalg.cholesky(within + 1e-4 * torch.eye(12)))  # another root, the same eigenvalues
    assert found["lidar_z"] == pytest.approx(entropy_rank(torch.linalg.eigvalsh(root @ between @ root.T)), rel=1e-6)


def test_steps_and_ranks_add_up():
    h, z = made()
    whole, parts = of_windows(h, z, 1), of_windows(h, z, 3)
    for name in ("rankme_h", "rankme_z", "lidar_z", "alpha_h", "std_z", "alignment_z"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-9)
    total = add_sums(window_sums(h, z), window_sums(*made(seed=1)))
    assert float(total["positive_counts"].sum()) == 2 * 96
    assert float(total["negative_counts"].sum()) == 2 * 96 * 95


def test_histograms_count_where_similarities_lie():
    e = torch.eye(4, dtype=torch.float64)
    sums = window_sums([e, e], [e[:2], torch.stack([e[0], -e[1]])])
    positive = sums["positive_counts"].tolist()
    assert (positive[NUM_BINS - 1], positive[0], sum(positive)) == (1, 1, 2)
    negative = sums["negative_counts"].tolist()
    assert (negative[NUM_BINS // 2], sum(negative)) == (2, 2)


def test_ranks_of_known_spectra():
    assert float(effective_rank(torch.ones(7))) == pytest.approx(7)
    assert float(effective_rank(torch.tensor([3.0, 0.0, 0.0]))) == pytest.approx(1)
    ranks = torch.arange(1, 65, dtype=torch.float64)
    assert power_law_exponent(ranks**-1.3, 1000) == pytest.approx(1.3, rel=1e-9)
    assert power_law_exponent(ranks**-0.7, 40) == pytest.approx(0.7, rel=1e-9)
    assert math.isnan(power_law_exponent(ranks[:5] ** -1.0, 1000))


def test_fp32_is_near():
    h, z = made()
    exact, rounded = of_windows(h, z, 2), of_windows([x.float() for x in h], [x.float() for x in z], 2)
    for name, value in exact.items():
        assert rounded[name] == pytest.approx(value, rel=2e-3), name


@pytest.mark.parametrize("kind", ["one point", "a line", "no views"])
def test_a_collapsed_representation_raises_the_alarm_in_the_second_epoch(kind):
    generator = torch.Generator().manual_seed(0)
    point = torch.randn(12, generator=generator)
    z = {
        "one point": [point + 1e-3 * torch.randn(64, 12, generator=generator) for _ in range(2)],
        "a line": [torch.randn(64, 1, generator=generator) * point for _ in range(2)],
        "no views": [torch.randn(512, 128, generator=generator) for _ in range(2)],
    }[kind]
    bad = representation_metrics(window_sums([torch.randn(64, 8), torch.randn(64, 8)], z), 2)
    good = representation_metrics(window_sums(*made()), 2)
    signal = {"one point": "std_z", "a line": "rankme_z", "no views": "similarity_gap"}[kind]
    assert bad[signal] < COLLAPSE_THRESHOLDS[signal] < good[signal]
    since: dict[str, int] = {}
    assert update_alarm(since, good, 0) == []
    assert update_alarm(since, bad, 1) == []
    lines = update_alarm(since, bad, 2)
    assert any(signal in line and "since epoch 2" in line for line in lines)
    assert update_alarm(since, good, 3) == []
    assert since == {}


def test_pairs_of_large_batches_are_a_part_of_them():
    z = [torch.randn(600, 4) for _ in range(2)]
    sums = window_sums(z, z)
    assert float(sums["num_negative"]) == 512 * 511
    assert float(sums["num_rows"]) == 1200
