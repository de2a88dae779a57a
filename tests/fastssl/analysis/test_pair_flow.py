"""Closed-form gradients of losses over pairs against autograd, and their coefficients over similarity."""

import pytest
import torch

from fastssl.analysis.gradflow import GRID, compared_objectives, mean_flow, row_differences
from fastssl.analysis.pair_flow import pair_flow
from fastssl.errors import ConfigError
from fastssl.losses import LOSSES, MioConfig, NtXentConfig, SpectralConfig, build_loss
from tests.fastssl.losses.test_losses import CONFIGS
from tests.helpers.pairs import clustered_rows, random_rows

CLOSED = ("mio", "simclr", "dcl", "dclw", "siglip", "spectral")


@pytest.mark.parametrize("rows", [random_rows, clustered_rows])
@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_the_gradient(name: str, rows) -> None:
    z = rows(2, 9, 5)
    if name == "spectral":
        norms = z.norm(dim=2)
        z = z * (1.01 * 3**0.5 / norms.median())  # half of the rows are shortened, and none is just at the edge
    differences = row_differences(build_loss(CONFIGS[name]), CONFIGS[name], z)
    assert differences.shape == (18,)
    assert float(differences.max()) < 1e-12


def test_projections_of_any_length_and_fp32_are_taken() -> None:
    loss, z = build_loss(CONFIGS["exp"]), 30 * random_rows(2, 9, 5).float()
    assert pair_flow(loss, z).gradient().dtype == torch.float32
    assert float(row_differences(loss, CONFIGS["exp"], z).max()) < 1e-12


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in CLOSED])
def test_a_loss_without_a_closed_form_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"loss.name: {name} has no closed-form"):
        pair_flow(build_loss(LOSSES[name][0](), 5), random_rows(2, 6, 5))


def test_coefficients_over_similarity_are_those_of_the_pairs() -> None:
    """exp has no share of the batch in them: what a pair has is what the curve says."""
    flow = pair_flow(build_loss(MioConfig(temperature_negative=0.3)), random_rows(2, 6, 5))
    similarities = flow.similarities[flow.counted]
    attraction, repulsion = flow.over_similarity(similarities)
    torch.testing.assert_close(repulsion, flow.beta()[flow.counted])
    torch.testing.assert_close(attraction, torch.full_like(attraction, 2.0))
    torch.testing.assert_close(flow.alpha(), torch.full_like(flow.alpha(), 2.0))


def test_mean_flow_is_the_mean_over_the_pairs() -> None:
    z = clustered_rows(2, 6, 5)
    found = mean_flow(build_loss(MioConfig(negative="naive", temperature_positive=0.2, temperature_negative=0.5)), z)
    u = torch.nn.functional.normalize(z.flatten(0, 1), dim=1)
    positive = torch.tensor([float(u[i] @ u[i + 6]) for i in range(6)], dtype=z.dtype)
    others = [(i, k) for i in range(12) for k in range(12) if i % 6 != k % 6]
    negative = torch.tensor([float(u[i] @ u[k]) for i, k in others], dtype=z.dtype)
    assert found == pytest.approx(
        {
            "attraction": float(torch.sigmoid(-positive / 0.2).mean() / 0.2),
            "repulsion": float(torch.sigmoid(negative / 0.5).mean() / 0.5),
            "positive_similarity": float(positive.mean()),
            "negative_similarity": float(negative.mean()),
        },
        rel=1e-12,
    )


def test_the_naive_attraction_vanishes_where_the_linear_one_stays() -> None:
    """At tau = .1 near s = 1: 4.5e-5 of the full strength, .12 at tau = .5."""
    for tau, share in ((0.1, 4.54e-5), (0.5, 0.1192)):
        z = random_rows(2, 6, 5)
        naive = pair_flow(build_loss(MioConfig(negative="naive", temperature_positive=tau)), z)
        linear = pair_flow(build_loss(MioConfig(temperature_positive=tau)), z)
        ratio = naive.over_similarity(GRID[-1:])[0] / linear.over_similarity(GRID[-1:])[0]
        assert float(ratio) == pytest.approx(share, rel=1e-3)


def test_simclr_lets_go_of_an_easy_positive() -> None:
    flow = pair_flow(build_loss(NtXentConfig(temperature=0.1)), clustered_rows(2, 8, 5))
    attraction, repulsion = flow.over_similarity(GRID)
    assert float(attraction[-1]) < 0.9 * float(attraction[0])
    assert (repulsion.diff() > 0).all()


def test_each_objective_stands_once_beside_the_runs_own() -> None:
    own = MioConfig(negative="naive", temperature_positive=0.2, temperature_negative=0.3)
    found = compared_objectives(own)
    assert next(iter(found)) == "mio naive"
    assert found["mio naive"] is own
    assert len(found) == 11
    assert found["mio exp"] == MioConfig(temperature_positive=0.2, temperature_negative=0.3)
    assert found["simclr"] == NtXentConfig(temperature=0.2)
    assert compared_objectives(SpectralConfig())["simclr"] == NtXentConfig(temperature=0.5)
