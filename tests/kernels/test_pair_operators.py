"""The operators behind the losses over pairs: registration, torch.compile, autograd's rules, dtypes, layout, memory."""

import importlib
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kernels.gram_loss.terms
import kernels.pair_loss.terms
import kernels.partition_loss.terms
from kernels.gram_loss import quadratic_loss, spectral_loss
from kernels.pair_loss import pair_loss
from kernels.partition_loss import partition_loss
from kernels.similarity import chunked
from tests.helpers.pairs import random_rows

GROUPS = torch.arange(13) % 9

LOSSES: dict[str, Callable[..., Tensor]] = {
    "siglip": lambda z, t, b: pair_loss(
        z, negatives="softplus", positives="softplus", inv_temperature=t, bias=b, balanced=False, topology="cross"
    ),
    "exp": lambda z, t, b: pair_loss(z, negatives="exp", inv_temperature=t, bias=b),
    "jensen with groups": lambda z, t, b: pair_loss(z, negatives="jensen", inv_temperature=t, bias=b, groups=GROUPS),
    "nt_xent": lambda z, t, b: partition_loss(z, inv_temperature=t) + b,
    "dclw with groups": lambda z, t, b: partition_loss(z, form="dclw", inv_temperature=t, groups=GROUPS) + b,
    "clip": lambda z, t, b: partition_loss(z, inv_temperature=t, topology="cross") + b,
    "spectral": lambda z, t, b: spectral_loss(z) * t + b,
    "quadratic": lambda z, t, b: quadratic_loss(z, inv_temperature=2.0) * t + b,
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def inputs(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """z [2, 13, 6], t, b, all with a gradient."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return [
        x.requires_grad_()
        for x in (random_rows(2, 13, 6).to(dtype), torch.tensor(2.5, dtype=wide), torch.tensor(-0.6, dtype=wide))
    ]


def value_and_grads(loss: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def assert_equal(ours: list[Tensor], expected: list[Tensor]) -> None:
    for x, wanted in zip(ours, expected, strict=True):
        assert torch.equal(x, wanted)


# -- registration and torch.compile


def operators() -> dict[str, tuple]:
    """Each operator with inputs as its loss calls it."""
    z, t, b = inputs()
    rows, pairs = torch.rand(2, 13, dtype=torch.float64), torch.rand(1, 13, dtype=torch.float64)
    u, one = z.detach(), torch.rand((), dtype=torch.float64)
    pair, partition, gram = kernels.pair_loss.terms, kernels.partition_loss.terms, kernels.gram_loss.terms
    return {
        "pair": (pair._pair_terms, (z, t, b, GROUPS, "exp", "self", "chunked", True, True, True)),
        "pair of constants": (
            pair._pair_terms,
            (z, t.detach(), b.detach(), None, "exp", "self", "chunked", False, True, False),
        ),
        "pair without gradient": (
            pair._pair_terms,
            (u, one, one, None, "softplus", "cross", "chunked", True, False, False),
        ),
        "pair backward": (pair._pair_terms_backward, (u, one, rows, u, one, pairs, one, "self", "chunked", True)),
        "pair of constants backward": (
            pair._pair_terms_backward,
            (u, one, rows, u, one, pairs, one, "self", "chunked", False),
        ),
        "partition": (partition._partition_terms, (z, t, one, GROUPS, "self", "chunked")),
        "partition backward": (
            partition._partition_terms_backward,
            (u, one, one, None, pairs, rows, "cross", "chunked"),
        ),
        "gram": (gram._gram_terms, (z, 0.5, 1.0, True, "self", "chunked", True)),
        "gram without gradient": (gram._gram_terms, (u, 0.5, 1.0, False, "cross", "chunked", False)),
        "gram backward": (gram._gram_terms_backward, (u, rows, u, pairs, one, True, "self")),
    }


@pytest.mark.parametrize("name", operators())
def test_opcheck(name: str) -> None:
    operator, arguments = operators()[name]
    torch.library.opcheck(operator, arguments)


@every_loss
def test_compiled_as_one_graph_it_gives_the_same(name: str) -> None:
    expected = value_and_grads(LOSSES[name], inputs())
    torch.compiler.reset()
    compiled = torch.compile(LOSSES[name], fullgraph=True, backend="aot_eager")
    for ours, wanted in zip(value_and_grads(compiled, inputs()), expected, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-13, atol=1e-14)
    with torch.no_grad():  # another graph: without the gradient's operator
        torch.testing.assert_close(compiled(*inputs()), expected[0], rtol=1e-13, atol=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # of inductor itself
@every_loss
def test_compiled_by_inductor_it_gives_the_same(name: str) -> None:
    expected = value_and_grads(LOSSES[name], inputs(torch.float32))
    torch.compiler.reset()
    compiled = torch.compile(LOSSES[name], fullgraph=True)
    for ours, wanted in zip(value_and_grads(compiled, inputs(torch.float32)), expected, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)


# -- autograd's rules


@every_loss
def test_upstream_gradient_scales_and_the_graph_can_be_retained(name: str) -> None:
    leaves = inputs()
    value = LOSSES[name](*leaves)
    once = torch.autograd.grad(value, leaves, retain_graph=True)
    assert_equal(list(torch.autograd.grad(value, leaves, retain_graph=True)), list(once))
    for scaled, x in zip(torch.autograd.grad(-3.5 * value, leaves), once, strict=True):
        torch.testing.assert_close(scaled, -3.5 * x, rtol=1e-13, atol=1e-15)


@every_loss
def test_a_second_derivative_is_refused(name: str) -> None:
    leaves = inputs()
    (grad,) = torch.autograd.grad(LOSSES[name](*leaves), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        grad.square().sum().backward()


@every_loss
def test_two_runs_give_the_same_bits(name: str) -> None:
    assert_equal(value_and_grads(LOSSES[name], inputs()), value_and_grads(LOSSES[name], inputs()))


@every_loss
def test_only_what_needs_a_gradient_gets_one(name: str) -> None:
    expected = value_and_grads(LOSSES[name], inputs())
    for wanted in range(3):
        leaves = [x.detach().requires_grad_(i == wanted) for i, x in enumerate(inputs())]
        value = LOSSES[name](*leaves)
        assert torch.equal(value.detach(), expected[0])
        (grad,) = torch.autograd.grad(value, leaves[wanted])
        assert torch.equal(grad, expected[1 + wanted])


class Operations(TorchDispatchMode):
    """Counts matrix products, and records the names of operations and the most elements of a tensor they gave."""

    def __init__(self) -> None:
        super().__init__()
        self.num_products = self.num_elements = 0
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        self.num_products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        if isinstance(result, Tensor):
            self.num_elements = max(self.num_elements, result.numel())
        return result


@contextmanager
def operations(monkeypatch: pytest.MonkeyPatch, impl: str = "chunked") -> Iterator[Operations]:
    """The operations of an implementation's functions, also within operators, where torch shows none of them."""
    mode, load_impl = Operations(), kernels.pair_loss.terms.load_impl

    def watched(function: Callable) -> Callable:
        def call(*args):
            with mode:
                return function(*args)

        return call

    module = load_impl(impl)  # pyright: ignore[reportArgumentType]
    spy = SimpleNamespace(**{name: watched(getattr(module, name)) for name in ("normalize", "accumulate", "finish")})
    with monkeypatch.context() as patch:
        for terms in (kernels.pair_loss.terms, kernels.partition_loss.terms):
            patch.setattr(terms, "load_impl", lambda _: spy)
        yield mode


WAITING = {"index", "_local_scalar_dense", "nonzero", "masked_select", "_unique2"}  # aten: a GPU's stream is waited for


OF_MORE_VIEWS = ("exp", "jensen with groups", "nt_xent", "quadratic")


@pytest.mark.parametrize(
    ("name", "num_views"), [*((name, 2) for name in LOSSES), *((name, 3) for name in OF_MORE_VIEWS)]
)
def test_nothing_waits_for_the_device(name: str, num_views: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An index that is a list is copied to the device and waited for."""
    _, t, b = inputs()
    gram = kernels.gram_loss.terms
    monkeypatch.setattr(gram, "_gram_terms", lambda *args: gram._AcrossRanks.apply(*args, gram.ALONE))  # no operator
    with operations(monkeypatch) as mode, mode:
        value_and_grads(LOSSES[name], [random_rows(num_views, 13, 6).requires_grad_(), t, b])
    assert len(mode.names) > 10
    assert not WAITING & mode.names


PAIR_LOSSES = [name for name in LOSSES if name not in ("spectral", "quadratic")]


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_without_a_gradient_its_product_is_left_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One tile for each of the pairs of blocks (0, 0), (0, 1), (1, 1), or (0, 1) alone: similarities, then pulls."""
    loss, leaves = LOSSES[name], inputs()
    num_tiles, num_pulls = (1, 2) if name in ("siglip", "clip") else (3, 4)
    found = {}
    with operations(monkeypatch) as found["with"]:
        value = loss(*leaves)
        torch.autograd.grad(value, leaves[0])
    with operations(monkeypatch) as found["no_grad"], torch.no_grad():
        silent = loss(*leaves)
    with operations(monkeypatch) as found["detached"]:
        loss(*(x.detach() for x in leaves))
    assert not silent.requires_grad
    assert torch.equal(silent, value)
    two_passes = name in ("nt_xent", "dclw with groups", "clip")
    assert found["with"].num_products == num_tiles * (2 if two_passes else 1) + num_pulls
    assert found["no_grad"].num_products == found["detached"].num_products == num_tiles


@pytest.mark.parametrize("name", ["spectral", "quadratic"])
def test_without_a_gradient_moments_keep_nothing_for_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    operator = kernels.gram_loss.terms._gram_terms
    monkeypatch.setattr(kernels.gram_loss.terms, "_gram_terms", lambda *args: kept.append(operator(*args)) or kept[-1])
    leaves = inputs()
    value = LOSSES[name](*leaves)
    with torch.no_grad():
        silent = LOSSES[name](*leaves)
    assert torch.equal(silent, value)
    assert [pulls.numel() for *_, pulls in kept] == [2 * 13 * 6, 0]


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_without_a_gradient_moments_ask_for_no_pulls(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, asked = importlib.import_module(f"kernels.gram_loss.{impl}"), []
    add_rows = module.add_rows
    monkeypatch.setattr(module, "add_rows", lambda *args: asked.append(args[-1] is not None) or add_rows(*args))
    z = random_rows(2, 13, 6).requires_grad_()
    spectral_loss(z, impl=impl)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        spectral_loss(z, impl=impl)  # pyright: ignore[reportArgumentType]
    assert asked == ([True, True] if impl == "chunked" else [False, False]) + [False, False]  # autograd needs none


# -- memory


@pytest.mark.parametrize("name", ["exp", "siglip", "nt_xent", "clip"])
def test_chunked_never_holds_the_matrix(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(chunked.TILE_ROWS, "cpu", 60)
    largest = {}
    for impl in ("chunked", "reference"):
        _, t, b = inputs()
        leaves = [random_rows(2, 256, 6).requires_grad_(), t, b]
        with operations(monkeypatch, impl) as mode:
            value_and_grads(LOSSES[name], leaves)
        largest[impl] = mode.num_elements
    num_rows = 256 if name in ("siglip", "clip") else 512
    assert largest == {"chunked": 60 * 60, "reference": num_rows * num_rows}  # a tile


def test_moments_never_hold_the_matrix() -> None:
    """Nothing larger than the rows themselves or D x D: seen within the operator's own function."""
    z, width = random_rows(2, 300, 8), 8
    with Operations() as mode:
        kernels.gram_loss.terms._forward(z, 0.5, 1.0, True, "self", "chunked", True, kernels.gram_loss.terms.ALONE)
    assert mode.num_products > 0
    assert mode.num_elements == 2 * 300 * width


@pytest.mark.parametrize("name", ["nt_xent", "clip"])
def test_unit_rows_are_free_when_the_gradient_is_made(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward pass of two passes holds pulls and dz then, as that of one pass does."""
    alive, at_finish = weakref.WeakSet(), []

    def normalize(*args):
        rows = chunked.normalize(*args)
        alive.add(rows.u)
        return rows

    def finish(*args):
        at_finish.append(len(alive))
        return chunked.finish(*args)

    spy = SimpleNamespace(normalize=normalize, accumulate=chunked.accumulate, finish=finish)
    monkeypatch.setattr(kernels.partition_loss.terms, "load_impl", lambda _: spy)
    value_and_grads(LOSSES[name], inputs())
    assert at_finish == [0]


def test_unit_rows_take_the_memory_of_the_widened_ones() -> None:
    """Of bf16 rows one fp32 copy; beside it the products of one pair of views."""
    z = random_rows(2, 64, 32).bfloat16()
    with NewMemory() as mode:
        chunked.normalize(z, torch.ones(()))
    assert mode.num_bytes <= 1.5 * z.numel() * 4 + 10 * 2 * 64 * 4  # and some numbers a row


class NewMemory(TorchDispatchMode):
    """The bytes of all storages that operations give, each once."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[int, Tensor] = {}

    @property
    def num_bytes(self) -> int:
        return sum(x.untyped_storage().nbytes() for x in self.kept.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)} - set(self.kept)
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in given:
            self.kept.setdefault(result.untyped_storage().data_ptr(), result)
        return result


class TwoRanks:
    """The other rank has this one's rows turned round."""

    size = 2

    def __init__(self) -> None:
        self.gathered = weakref.WeakSet()

    def check_same_shape(self, z: Tensor) -> None:
        pass

    def blocks(self, x: Tensor) -> Iterator[Tensor]:
        yield x.detach()
        other = x.detach().flip(0, 1)
        self.gathered.add(other)
        yield other

    def sum_(self, x: Tensor) -> Tensor:
        return x

    def mean(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("topology", ["self", "cross"])
def test_gathered_rows_are_free_after_the_backward_pass(topology) -> None:
    """And stay for a second one where the graph is retained."""
    z, exchange = random_rows(2, 13, 6).requires_grad_(), TwoRanks()
    groups = torch.arange(13) % 9
    value = partition_loss(z, inv_temperature=2.0, topology=topology, groups=groups, exchange=exchange)
    first, second = (torch.autograd.grad(value, z, retain_graph=retained)[0] for retained in (True, False))
    assert torch.equal(first, second)
    assert value.isfinite()  # the loss is still there
    assert len(exchange.gathered) == 0


# -- dtypes and layout


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@every_loss
def test_low_precision_under_autocast_is_computed_in_fp32(name: str, dtype: torch.dtype) -> None:
    leaves = inputs(dtype)
    expected = value_and_grads(LOSSES[name], [x.detach().double().requires_grad_() for x in leaves])
    with torch.autocast("cpu", torch.bfloat16):
        value, *grads = value_and_grads(LOSSES[name], leaves)
    assert value.dtype == torch.float32
    assert [x.dtype for x in grads] == [dtype, torch.float32, torch.float32]
    torch.testing.assert_close(value.double(), expected[0], rtol=3e-6, atol=3e-6)
    for ours, exact in zip(grads, expected[1:], strict=True):
        rounding = torch.finfo(ours.dtype).eps + 1e-5
        assert (ours.double() - exact).norm() <= rounding * exact.norm() + 1e-6


@every_loss
def test_rows_that_are_not_contiguous(name: str) -> None:
    expected = value_and_grads(LOSSES[name], inputs())
    z, t, b = inputs()
    for order in ((2, 0, 1), (1, 0, 2), (2, 1, 0)):
        back = torch.tensor(order).argsort().tolist()
        strided = z.detach().permute(order).contiguous().permute(back).requires_grad_()
        assert not strided.is_contiguous()
        for ours, wanted in zip(value_and_grads(LOSSES[name], [strided, t, b]), expected, strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-13, atol=1e-14)
    expanded = z.detach()[:, :1].expand(2, 13, 6).requires_grad_()
    dense = expanded.detach().clone().requires_grad_()
    for ours, wanted in zip(*(value_and_grads(LOSSES[name], [x, t, b]) for x in (expanded, dense)), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-13, atol=1e-14)


# -- launches


VIEWS_ONLY = {
    "view", "expand", "unsqueeze", "detach", "select", "slice", "t", "transpose", "alias", "as_strided", "permute",
    "squeeze", "empty", "new_empty", "split", "unbind", "_unsafe_view",
}  # fmt: skip


class Launches(TorchDispatchMode):
    """Counts the operations that launch a kernel on a GPU; one of this package counts once."""

    def __init__(self) -> None:
        super().__init__()
        self.num = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.num += func.overloadpacket.__name__ not in VIEWS_ONLY
        return func(*args, **(kwargs or {}))


def test_a_loss_of_constants_launches_little_around_its_operators() -> None:
    """At 1,024 rows a loss in eager mode is bound by its launches."""
    (z, *_) = inputs(torch.float32)
    with Launches() as forward:
        value = pair_loss(z, negatives="exp", inv_temperature=5.0)
    with Launches() as backward:
        value.backward()
    assert (forward.num, backward.num) == (7, 5)
