"""The step as a CUDA graph would run it, on the CPU: recorded operators, replayed without Python, bit for bit.

Every case takes the same steps twice: plainly, and with its last steps replayed from a recording of one of them.
"""

import copy
import itertools

import pytest
import torch

from fastssl.config import build_config
from fastssl.errors import ConfigError
from fastssl.losses import LOSSES
from fastssl.optim.skipping import match_layout
from fastssl.step.cuda_graph import NUM_PLAIN_STEPS, CapturedStep, choose_step
from fastssl.step.device_update import DeviceUpdate
from tests.helpers.host_reads import HostReadError, no_host_reads
from tests.helpers.tape import Tape
from tests.helpers.tiny_step import NUM_STEPS, OPTIMIZERS, batch_of, build, rates_of

RECORDED = 2  # the step (from 0) that is recorded; those after it are replayed


def state_of(steps, objective, engine, probe):
    optimizers = [
        value
        for optimizer in (engine.optimizer, probe.optimizer)
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]
    tensors = [*objective.state_dict().values(), *optimizers, *probe.parameters(), *steps.sums.values()]
    return copy.deepcopy([tensor.detach() for tensor in tensors])


def assert_same(a, b):
    assert len(a) == len(b)
    differing = [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if not torch.equal(x, y)]
    assert not differing


def run_plain(built, bad, optimizer):
    steps = built[0]
    reports = [
        steps.run(batch_of(step, step in bad), **rates_of(step, optimizer)).report.clone() for step in range(NUM_STEPS)
    ]
    return reports, state_of(*built)


def run_replayed(built, bad, optimizer, first=0):
    """Steps from `first` on; with the state that those before it left."""
    steps, reports = built[0], []
    static, tape, result = batch_of(0), Tape(), None
    for step in range(first, NUM_STEPS):
        batch = batch_of(step, step in bad)
        if step < RECORDED:
            reports.append(steps.run(batch, **rates_of(step, optimizer)).report.clone())
            continue
        for target, source in zip((*static.views, static.labels), (*batch.views, batch.labels), strict=True):
            target.copy_(source)
        static.sample_ids.copy_(batch.sample_ids)
        steps.prepare(**rates_of(step, optimizer))
        if step == RECORDED:
            with tape:
                result = steps.body(static.views, static.labels, static.sample_ids)
        else:
            tape.replay()
        assert result is not None
        reports.append(result.report.clone())
    return reports, state_of(*built)


CASES = [
    ("mio", "sgd", "fp32", 0.0, ()),
    ("mio", "sgd", "bf16", 0.5, (0, 4)),
    ("minc", "lars", "fp32", 0.0, (1, 5)),
    ("byol", "adamw", "bf16", 0.0, (0, 3)),
    ("barlow_twins", "lamb", "fp32", 0.5, (0, 4)),
]


@pytest.mark.parametrize(("loss", "optimizer", "precision", "clip", "bad"), CASES)
def test_replayed_operators_equal_the_plain_step(loss, optimizer, precision, clip, bad):
    settings = {"loss": loss, "optimizer": optimizer, "precision": precision, "clip": clip}
    plain, plain_state = run_plain(build(**settings), bad, optimizer)
    replayed, replayed_state = run_replayed(build(**settings), bad, optimizer)
    taken = [bool(report[0]) for report in plain]
    assert taken == [step not in bad for step in range(NUM_STEPS)]
    for a, b in zip(plain, replayed, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert_same(plain_state, replayed_state)
    assert all(x.isfinite().all() for x in plain_state)


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "optimizer"), itertools.product(LOSSES, OPTIMIZERS))
def test_every_loss_and_optimizer(loss, optimizer):
    for precision in ("fp32", "bf16"):
        settings = {"loss": loss, "optimizer": optimizer, "precision": precision}
        plain, plain_state = run_plain(build(**settings), (0, 4), optimizer)
        replayed, replayed_state = run_replayed(build(**settings), (0, 4), optimizer)
        assert [bool(report[0]) for report in plain] == [step not in (0, 4) for step in range(NUM_STEPS)]
        assert_same(plain_state, replayed_state)
        torch.testing.assert_close(plain, replayed, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_replays_go_on_from_a_loaded_state(optimizer):
    """Loading replaces the optimizer's state and learning rate: what is replayed must hold the new ones."""
    plain, plain_state = run_plain(build("minc", optimizer), (3,), optimizer)
    interrupted = build("minc", optimizer)
    for step in range(RECORDED):
        interrupted[0].run(batch_of(step), **rates_of(step, optimizer))
    resumed = build("minc", optimizer)
    steps, objective, engine, probe = resumed
    saved = copy.deepcopy([x.state_dict() for x in (interrupted[1], interrupted[2].optimizer, interrupted[3])])
    for part, state in zip((objective, engine.optimizer, probe), saved, strict=True):
        part.load_state_dict(state)
    for name, value in steps.sums.items():
        value.copy_(interrupted[0].sums[name])
    steps.update.bind()
    replayed, replayed_state = run_replayed(resumed, (3,), optimizer, first=RECORDED)
    torch.testing.assert_close(plain[RECORDED:], replayed, rtol=0, atol=0, equal_nan=True)
    assert_same(plain_state, replayed_state)


def test_a_tape_would_see_a_number_that_python_chose():
    """Or the tests above would pass whatever the step does."""
    number, out, tape = 1.0, torch.zeros(()), Tape()
    with tape:
        out.fill_(number)
    number = 2.0
    tape.replay()
    assert out == 1


@pytest.mark.parametrize("loss", LOSSES)
def test_no_loss_reads_a_value_on_the_host(loss):
    steps, *_ = build(loss)
    steps.run(batch_of(0), **rates_of(0, "sgd"))
    batch = batch_of(1, bad=True)
    with no_host_reads():
        steps.run(batch, **rates_of(1, "sgd"))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_no_optimizer_reads_a_value_on_the_host(optimizer):
    steps, *_ = build("minc", optimizer, clip=0.1)
    batch = batch_of(1, bad=True)
    with no_host_reads():
        steps.run(batch, **rates_of(1, optimizer))


def test_host_reads_are_found():
    x, rows = torch.ones(3), torch.eye(3)
    for read in (
        lambda: x[0].item(),
        lambda: bool(x[0] > 0),
        lambda: x.tolist(),
        lambda: x.numpy(),
        lambda: x.cpu(),
        lambda: torch.tensor(1.0),
        lambda: rows[[0, 1]],
        lambda: rows[x > 0],
        lambda: x.nonzero(),
    ):
        with pytest.raises(HostReadError), no_host_reads():
            read()


def test_a_run_that_cannot_be_captured_says_why():
    for tree, words in (
        ({"train": {"zero_stage": 1}}, "zero_stage is 1"),
        ({"train": {"precision": "fp16"}}, "fp16"),
        ({"train": {"num_micro_batches": 2}}, "encodes images again"),
        ({"model": {"activation_checkpointing": True}}, "encodes images again"),
        ({"optim": {"impl": "torch"}}, "optim.impl"),
        ({"ds": {"comms_logger": {"enabled": False}}}, "ds is set"),
    ):
        train = {"cuda_graph": True, **tree.get("train", {})}
        cfg = build_config({**tree, "train": train})
        steps, *_ = build()
        steps.is_direct = "optim" not in tree
        with pytest.raises(ConfigError, match=words):
            choose_step(cfg, steps, torch.device("cuda"))
    with pytest.raises(ConfigError, match="not on a GPU"):
        choose_step(build_config({"train": {"cuda_graph": True}}), steps, torch.device("cpu"))


def test_where_it_is_chosen_automatically_a_cpu_takes_the_plain_step(capfd):
    steps, *_ = build()
    assert isinstance(steps.update, DeviceUpdate)
    assert choose_step(build_config({}), steps, torch.device("cpu")) is steps
    assert not capfd.readouterr().err


def test_a_capture_that_fails_ends_the_run_with_its_cause(monkeypatch):
    for name in ("synchronize", "set_stream", "Stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    captured = CapturedStep(build()[0], torch.device("cpu"))

    def fail(_):
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")  # as torch does

    monkeypatch.setattr(captured, "_capture", fail)
    for step in range(NUM_PLAIN_STEPS):
        captured.run(batch_of(step), **rates_of(step, "sgd"))
    with pytest.raises(
        ConfigError, match=r"\(operation not permitted when stream is capturing\): set train.cuda_graph=false"
    ):
        captured.run(batch_of(3), **rates_of(3, "sgd"))


def test_full_memory_in_a_capture_is_told_as_such(monkeypatch):
    """Or `fastssl train FOLDER` would not try a smaller batch."""
    for name in ("synchronize", "set_stream", "Stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    captured = CapturedStep(build()[0], torch.device("cpu"))

    def fail(_):
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(captured, "_capture", fail)
    captured._num_plain = NUM_PLAIN_STEPS
    with pytest.raises(torch.OutOfMemoryError):
        captured.run(batch_of(3), **rates_of(3, "sgd"))


def test_loaded_state_takes_the_layout_of_its_weights():
    """Fused kernels pair weights and state by their places in memory."""
    weight = torch.nn.Parameter(torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, fused=True)
    momentum = torch.randn(4, 3, 2, 2)
    saved = optimizer.state_dict() | {"state": {0: {"momentum_buffer": momentum.clone()}}}
    optimizer.load_state_dict(saved)
    assert optimizer.state[weight]["momentum_buffer"].stride() != weight.stride()
    match_layout(optimizer)
    assert optimizer.state[weight]["momentum_buffer"].stride() == weight.stride()
    before, weight.grad = weight.detach().clone(), torch.zeros_like(weight)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), before - 0.1 * 0.9 * momentum)


def test_a_batch_of_another_shape_takes_a_plain_step_and_one_line(monkeypatch, capfd):
    for name in ("synchronize", "set_stream", "Stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    built, other = build(), build()
    captured = CapturedStep(built[0], torch.device("cpu"))
    captured._views, captured._graph = [torch.empty(16, 3, 16, 16)] * 2, object()  # it has no replay: never asked for
    captured._num_plain = NUM_PLAIN_STEPS
    for step in range(2):
        captured.run(batch_of(step), **rates_of(step, "sgd"))
        other[0].run(batch_of(step), **rates_of(step, "sgd"))
    assert_same(state_of(*built), state_of(*other))
    assert capfd.readouterr().err.count("\n") == 1
