"""MINC: its gradient against closed forms and the spectral loss's, a toy with a known solution, bounds, state, cost."""

import copy
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastssl.losses import Loss, Minc, MincConfig, SpectralConfig, build_loss

S = 10.0


def rows(num: int = 7, width: int = 4, *, seed: int = 0, views: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(views, num, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def minc(width: int = 4, **settings) -> Minc:
    loss = build_loss(MincConfig(**settings), width)
    assert isinstance(loss, Minc)
    return loss.double()


def with_moment(loss: Minc, seed: int = 3) -> Tensor:
    """Give the loss a Lambda/s that is no batch's own, and hold it; returns it."""
    width = len(loss.moment.average)
    u = F.normalize(rows(50, width, seed=seed, views=1)[0].detach(), dim=1)
    moment = u.T @ u / len(u)
    loss.moment.average.copy_(0.3 * moment)
    loss.moment.weight.fill_(0.3)
    loss.eval()
    return moment


# -- value and gradient


@pytest.mark.parametrize("gha", [False, True])
def test_gradient_is_the_closed_form(gha: bool) -> None:
    """dl/du_v = s^2 A u_v - s t_w, projected on the sphere; A u without 1/2 for the triangle too."""
    z, targets, loss = rows(), rows(seed=1), minc(gha=gha)
    moment = with_moment(loss)
    matrix = moment.tril() if gha else moment
    (grad,) = torch.autograd.grad(loss(*z, targets=list(targets)), z)
    u, t = F.normalize(z.detach(), dim=2), F.normalize(targets.detach(), dim=2)
    du = (S * S * u @ matrix.T - S * t.flip(0)) / (2 * z.shape[1])
    expected = (du - (du * u).sum(2, keepdim=True) * u) / z.detach().norm(dim=2, keepdim=True)
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-13)


def test_autograd_through_the_triangle_would_be_another_gradient() -> None:
    """It is that of (Lambda + diag Lambda)/2."""
    z, targets, loss = rows(), rows(seed=1), minc(gha=True)
    matrix = with_moment(loss).tril()
    u, t = F.normalize(z, dim=2), F.normalize(targets, dim=2).detach()
    naive = -S * (u * t.flip(0)).sum(2).mean() + S * S / 2 * (u * (u @ matrix.T)).sum(2).mean()
    value = loss(*z, targets=list(targets))
    torch.testing.assert_close(value, naive)  # the values agree
    ours, theirs = (torch.autograd.grad(x, z)[0] for x in (value, naive))
    assert (ours - theirs).norm() > 0.1 * ours.norm()


@pytest.mark.parametrize("alpha", [1.0, 1.2, 1.5, 2.0, 3.0])
def test_gradcheck(alpha: float) -> None:
    z, targets, loss = rows(), rows(seed=1), minc(alpha=alpha, alpha_floor=1e-3)
    with_moment(loss)
    assert torch.autograd.gradcheck(lambda z: loss(*z, targets=list(targets)), z)


def test_gradient_is_half_of_the_spectral_losses_at_a_fixed_target() -> None:
    """-E[phi.phi'] + E_indep[(phi.phi')^2]/2 over all pairs of rows: the value is the same, but both sides move."""
    z, loss = rows(), minc()
    value = loss(*z, targets=list(z.detach()))  # step 0: Lambda is the batch's own
    phi = math.sqrt(S) * F.normalize(z, dim=2)
    pairs = phi.flatten(0, 1) @ phi.flatten(0, 1).T
    spectral = -(phi[0] * phi[1]).sum(1).mean() + pairs.square().mean() / 2
    torch.testing.assert_close(value, spectral)
    ours, theirs = (torch.autograd.grad(x, z)[0] for x in (value, spectral))
    torch.testing.assert_close(ours, theirs / 2, rtol=1e-12, atol=1e-13)


def test_known_values() -> None:
    collapse = torch.zeros(2, 12, 6, dtype=torch.float64)
    collapse[..., 0] = 1
    assert minc(6)(*collapse, targets=list(collapse)).item() == pytest.approx(40)
    for k in (2, 3, 6):  # isotropic in k dimensions, partners equal
        ideal = torch.eye(6, dtype=torch.float64)[:k].repeat(12 // k, 1).expand(2, 12, 6)
        assert minc(6)(*ideal, targets=list(ideal)).item() == pytest.approx(-10 + 50 / k)


def test_low_precision_inputs_under_autocast_are_computed_in_fp32() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        z, targets = rows(32, 8, dtype=dtype), rows(32, 8, seed=1, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16):
            loss = build_loss(MincConfig(), 8)
            value = loss(*z, targets=list(targets))
        exact = minc(8)(*z.detach().double(), targets=list(targets.detach().double()))
        assert value.dtype == torch.float32
        assert loss.moment.average.dtype == torch.float32
        assert value.item() == pytest.approx(exact.item(), rel=1e-5, abs=1e-5)


def test_multi_crop_is_every_view_against_every_other_target() -> None:
    z, targets, loss = rows(views=4), rows(seed=1), minc()
    matrix = with_moment(loss)
    u, t = F.normalize(z, dim=2), F.normalize(targets, dim=2)
    terms = [
        -S * (u[v] * t[w]).sum(1).mean() + S * S / 2 * (u[v] * (u[v] @ matrix)).sum(1).mean()
        for v, w in [(0, 1), (1, 0), (2, 0), (2, 1), (3, 0), (3, 1)]
    ]
    torch.testing.assert_close(loss(*z, targets=list(targets)), sum(terms) / 6)


@pytest.mark.parametrize("gha", [False, True])
def test_torch_compile_takes_it_as_one_graph(gha: bool) -> None:
    z, targets = [view.detach().requires_grad_() for view in rows()], list(rows(seed=1).detach())
    loss = minc(gha=gha)
    torch.compiler.reset()
    compiled = torch.compile(minc(gha=gha), fullgraph=True, backend="aot_eager")
    for _ in range(2):  # the second step finds a Lambda
        values = [x(*z, targets=targets) for x in (compiled, loss)]
        torch.testing.assert_close(*values)
        torch.testing.assert_close(*(torch.autograd.grad(value, z) for value in values))


# -- Lambda


def test_lambda_is_used_before_its_update_and_bias_corrected() -> None:
    loss, steps = minc(moment_momentum=0.8), [rows(seed=seed) for seed in range(3)]
    moments = [u.T @ u / len(u) for u in (F.normalize(t.detach().flatten(0, 1), dim=1) for t in steps)]
    used = [moments[0], moments[0], (0.8 * 0.2 * moments[0] + 0.2 * moments[1]) / (1 - 0.8**2)]
    z = rows(seed=9)
    u = F.normalize(z.detach(), dim=2)
    for targets, moment in zip(steps, used, strict=True):
        t = F.normalize(targets.detach(), dim=2)
        expected = -S * (u * t.flip(0)).sum(2).mean() + S * S / 2 * (u * (u @ moment)).sum(2).mean()
        torch.testing.assert_close(loss(*z, targets=list(targets)), expected)


def test_lambda_does_not_move_in_evaluation_and_is_in_the_state() -> None:
    loss, z = minc(), rows()
    loss(*z, targets=list(z))
    state = copy.deepcopy(loss.state_dict())
    assert set(state) == {"moment.average", "moment.weight"}
    loss.eval()
    loss(*rows(seed=5), targets=list(z))
    assert all(torch.equal(value, state[name]) for name, value in loss.state_dict().items())
    other = minc()
    other.load_state_dict(state)
    assert torch.equal(other(*z, targets=list(z)), loss.train()(*z, targets=list(z)))


# -- a toy whose solution is known
#
# The cube {0, 1}^3: a view of corner i is i with one bit flipped, or none, as often as MASKS says. The eigenfunctions
# of this joint distribution are the characters (-1)^{popcount(i & S)}, and of modulus 1: the best phi of width k, the
# first k of them times the root of their eigenvalues, has the same norm at every corner, as rows of MINC must.

MASKS = [0] * 9 + [1] + [2] * 2 + [4] * 4
STEEP_MASKS = [0] * 3 + [1] * 2 + [2] * 4 + [4] * 7
CORNERS = torch.arange(8)
CHARACTERS = torch.tensor([[(-1.0) ** (i & s).bit_count() for s in range(8)] for i in range(8)], dtype=torch.float64)
WIDTH = 4


def eigenvalues(masks: list[int]) -> Tensor:
    """Of the characters s = 0..7; for these masks in falling order."""
    signs = [sum((-1) ** (m & s).bit_count() for m in masks) for s in range(8)]
    return torch.tensor(signs, dtype=torch.float64) / len(masks)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For many small operators: threads would only wait for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def train_on_the_cube(
    masks: list[int], *, gha: bool, through_triangle: bool = False, at_the_solution: bool = False
) -> tuple[Tensor, float]:
    """Coefficients [8 characters, WIDTH] of the learned phi, and J = E[phi.phi'] - |Lambda|^2/2 less the best one's."""
    view_a = CORNERS.repeat_interleave(len(masks))
    view_b = view_a ^ torch.tensor(masks).repeat(8)
    first = eigenvalues(masks)[:WIDTH]
    scale = float(first.sum())
    loss = minc(WIDTH, scale=scale, gha=gha)
    start = rows(8, WIDTH, views=1)[0].detach()
    table = torch.nn.Parameter(CHARACTERS[:, :WIDTH] * first.sqrt() + 0.1 * start if at_the_solution else start)
    optimizer = torch.optim.SGD([table], lr=0.4)
    for _ in range(1000):
        z = (table[view_a], table[view_b])
        value = loss(*z, targets=[x.detach() for x in z])
        if through_triangle:
            u, matrix = F.normalize(torch.stack(z), dim=2), (loss.moment.average / loss.moment.weight).tril()
            value = scale**2 / 2 * (u * (u @ matrix.T)).sum(2).mean() - scale * (u * u.detach().flip(0)).sum(2).mean()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        table.data = F.normalize(table.data, dim=1)
    phi = math.sqrt(scale) * table.detach()
    objective = (phi[view_a] * phi[view_b]).sum(1).mean() - (phi.T @ phi / 8).square().sum() / 2
    return CHARACTERS.T @ phi / 8, float(objective - first.square().sum() / 2)


def single_eigenfunctions(masks: list[int]) -> Tensor:
    """Coefficients of the solution in order, all positive."""
    expected = torch.zeros(8, WIDTH, dtype=torch.float64)
    expected.diagonal().copy_(eigenvalues(masks)[:WIDTH].sqrt())
    return expected


@pytest.mark.usefixtures("one_thread")
def test_it_finds_the_subspace_of_the_largest_eigenvalues() -> None:
    assert eigenvalues(MASKS).tolist() == [1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    coefficients, regret = train_on_the_cube(MASKS, gha=False)
    assert regret == pytest.approx(0, abs=1e-6)
    found = coefficients @ coefficients.T  # free of the rotation that the loss leaves open
    expected = single_eigenfunctions(MASKS)
    torch.testing.assert_close(found, expected @ expected.T, rtol=0, atol=1e-3)
    assert coefficients[:WIDTH].fill_diagonal_(0).abs().max() > 0.1  # rotated: no single eigenfunctions


@pytest.mark.usefixtures("one_thread")
def test_gha_finds_the_eigenfunctions_in_their_order() -> None:
    coefficients, regret = train_on_the_cube(MASKS, gha=True)
    assert regret == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(coefficients.abs(), single_eigenfunctions(MASKS), rtol=0, atol=1e-3)


@pytest.mark.usefixtures("one_thread")
def test_autograd_through_the_triangle_leaves_the_solution_for_a_wrong_subspace() -> None:
    """It halves the repulsion between functions: the first ones grow, the fourth is lost. gha comes back."""
    coefficients, regret = train_on_the_cube(STEEP_MASKS, gha=True, at_the_solution=True)
    assert regret == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(coefficients, single_eigenfunctions(STEEP_MASKS), rtol=0, atol=1e-3)
    coefficients, regret = train_on_the_cube(STEEP_MASKS, gha=True, at_the_solution=True, through_triangle=True)
    assert regret < -0.1
    used = coefficients.square().sum(1)  # by each eigenfunction
    assert used[0] > 1.1
    assert used[3] < 1e-3  # .25 is right


# -- a second toy, whose eigenfunctions have no constant modulus
#
# Four blocks of unequal mass: a view is followed by another of the same block, or (one in three) by any. The rows
# of the solution have squared norms between 1.4 and 7.

BLOCKS = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3])
MASSES = torch.tensor([3, 3, 3, 3, 2, 2, 2, 2])
SAME_BLOCK = torch.tensor([15, 20, 40, 40])[BLOCKS][:, None] * (BLOCKS[:, None] == BLOCKS)
COUNTS = 2 * SAME_BLOCK + MASSES[:, None] * MASSES


def smallest_cosine_on_the_blocks(loss: Loss) -> float:
    """Train a table on all pairs; the smallest cosine between its span and the eigenfunctions of the four largest."""
    joint = COUNTS.double() / COUNTS.sum()
    root = joint.sum(1).sqrt()
    top = torch.linalg.eigh(joint / root / root[:, None]).eigenvectors[:, -WIDTH:]
    view_a = torch.arange(8).repeat_interleave(COUNTS.sum(1))
    view_b = torch.arange(8).repeat(8).repeat_interleave(COUNTS.flatten())
    table = torch.nn.Parameter(rows(8, WIDTH, views=1)[0].detach())
    optimizer = torch.optim.SGD([table], lr=0.5)
    for _ in range(500):
        z = (table[view_a], table[view_b])
        optimizer.zero_grad()
        (loss(*z, targets=[x.detach() for x in z]) if isinstance(loss, Minc) else loss(*z)).backward()
        optimizer.step()
    unit = isinstance(loss, Minc) and loss.config.norm == "unit"
    phi = F.normalize(table.detach(), dim=1) if unit else table.detach()
    return float(torch.linalg.svdvals(top.T @ torch.linalg.qr(root[:, None] * phi).Q).min())


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "loss",
    [minc(WIDTH, norm="none"), minc(WIDTH, norm="clip", scale=10.0), build_loss(SpectralConfig(mu=10.0)).double()],
    ids=["none", "clip", "spectral"],
)
def test_rows_of_free_norm_find_the_eigenspace(loss: Loss) -> None:
    assert smallest_cosine_on_the_blocks(loss) >= 0.99


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "settings",
    [{"norm": "unit", "scale": 10.0}, {"norm": "unit", "scale": 2.0}, {"norm": "clip", "scale": 2.0}],
    ids=["unit, s 10", "unit, s 2", "clip below the solution's norms"],
)
def test_bounded_rows_miss_the_eigenspace(settings: dict) -> None:
    assert smallest_cosine_on_the_blocks(minc(WIDTH, **settings)) < 0.9


def test_clip_is_half_of_the_spectral_losses_gradient_with_mu_s() -> None:
    """Step 0, target = online network: the same functions, -E[phi.phi'] + E_indep[(phi.phi')^2]/2 in both."""
    z, loss = rows(64, seed=2), minc(norm="clip", scale=2.0)
    assert 0 < (z.norm(dim=2) > math.sqrt(2)).double().mean() < 1  # some rows are shortened, not all
    longest = math.sqrt(2.0)
    phi = z * (longest / z.norm(dim=2, keepdim=True).clamp_min(longest))
    all_rows = phi.flatten(0, 1)
    value = -(phi[0] * phi[1]).sum(1).mean() + (all_rows @ all_rows.T).square().mean() / 2
    ours = loss(*z, targets=list(z.detach()))
    torch.testing.assert_close(ours, value)
    mine, spectral = (torch.autograd.grad(x, z)[0] for x in (ours, value))
    torch.testing.assert_close(mine, spectral / 2, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("norm", ["clip", "none"])
def test_gradcheck_without_unit_rows(norm: str) -> None:
    z, targets, loss = rows(), rows(seed=1), minc(norm=norm, scale=3.0)
    with_moment(loss)
    assert torch.autograd.gradcheck(lambda z: loss(*z, targets=list(targets)), z)


def test_without_normalisation_the_scale_has_no_effect() -> None:
    z, targets = rows(), list(rows(seed=1).detach())
    values = [minc(norm="none", scale=scale)(*z, targets=targets) for scale in (1.0, 10.0)]
    torch.testing.assert_close(*values)


# -- bounds


@pytest.mark.parametrize("alpha", [1.0, 1.2, 1.5, 2.0, 3.0])
def test_no_embedding_beats_the_divergence_and_the_best_critic_meets_it(alpha: float) -> None:
    """-value <= D_alpha on the cube for any table, by the exact moments; equal where v^2 = (2/alpha) ratio^alpha."""
    joint = CHARACTERS @ torch.diag(eigenvalues(MASKS)) @ CHARACTERS.T / 64
    ratio = 64 * joint
    if alpha == 1:
        divergence = (joint * ratio.clamp_min(1e-300).log()).sum().item()
    else:
        divergence = ((ratio.clamp_min(0) ** alpha - 1) / (alpha * (alpha - 1))).mean().item()
    loss = minc(alpha=alpha, alpha_floor=1e-9)
    constant = 0.5 if alpha == 2 else 0.0  # that l leaves out
    for seed in range(20):
        phi = rows(8, 5, seed=seed, views=1)[0].detach()
        v = phi @ phi.T
        value = (-(joint * loss._attraction(v)).sum() + v.square().mean() / 2).item()
        assert -value - constant <= divergence + 1e-12
    v = (2 / alpha * ratio.clamp_min(0) ** alpha).sqrt()
    value = (-(joint * loss._attraction(v)).sum() + v.square().mean() / 2).item()
    assert -value - constant == pytest.approx(divergence, rel=1e-6)


def test_only_alpha_1_is_in_nats() -> None:
    assert minc(alpha=1.0).bound_nats(-0.7) == 0.7
    assert minc().bound_nats(-0.7) is None
    assert minc(alpha=1.5).bound_nats(-0.7) is None


def test_the_floor_ends_the_slope_of_the_alpha_family() -> None:
    """At alpha = 1.2 it is 710 at |v| = 1e-4."""
    for floor, expected in ((1e-9, 710.0), (0.1, 7.1)):
        v = torch.tensor([1e-4], dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(minc(alpha=1.2, alpha_floor=floor)._attraction(v).sum(), v)
        assert slope.item() == pytest.approx(expected, rel=0.01)


# -- cost


class LargestTensor(TorchDispatchMode):
    """Counts the numbers of the largest tensor that any operator gives."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return out


@pytest.mark.parametrize("gha", [False, True])
def test_no_tensor_is_larger_than_the_rows_or_the_moment(gha: bool) -> None:
    """Forward and backward: nothing with a number for each pair of samples, which would be 2,048^2."""
    for num, width in ((2048, 4), (16, 256)):
        z, targets, loss = rows(num, width), rows(num, width, seed=1), minc(width, gha=gha)
        with LargestTensor() as largest:
            torch.autograd.grad(loss(*z, targets=list(targets)), z)
        assert largest.numel == max(2 * num * width, width**2)


# -- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": 0.0}, r"scale must be in \[1e-6, 1e6\], not 0"),
        ({"scale": math.nan}, r"scale must be in \[1e-6, 1e6\], not nan"),
        ({"norm": "l1"}, "norm must be one of unit, clip, none, not 'l1'"),
        ({"alpha": 0.5}, r"alpha must be in \[1, 100\], not 0.5"),
        ({"alpha_floor": 0.0}, r"alpha_floor must be in \[1e-12, 1e6\]"),
        ({"gha": True, "alpha": 1.5}, "loss.gha needs loss.alpha=2, got 1.5"),
        ({"moment_momentum": 1.0}, r"moment_momentum must be in \[0, 1\), not 1"),
        ({"moment_momentum": -0.1}, "moment_momentum must be in"),
        ({"target_momentum": 1.1}, r"target_momentum must be in \[0, 1\], not 1.1"),
        ({"target_momentum": math.nan}, r"target_momentum must be in \[0, 1\], not nan"),
    ],
)
def test_bad_settings_name_their_key(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MincConfig(**settings)


def test_the_width_is_asked_for() -> None:
    with pytest.raises(ValueError, match=r"loss minc needs .* model.projector_dim"):
        build_loss(MincConfig())
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        minc()(*rows(1), targets=list(rows(1)))
