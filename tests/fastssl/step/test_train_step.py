"""Steps under a real DeepSpeed engine: what is not finite leaves no trace, and fp16's scale cancels."""

import copy
import os

import pytest
import torch

from fastssl.config import build_config
from fastssl.errors import UserError
from fastssl.losses import build_loss
from fastssl.machine.private_api import check_engine
from fastssl.models.objective import Objective
from fastssl.models.two_view import TwoViewModel
from fastssl.processes.launch import start_process
from fastssl.step.deepspeed_config import build_ds_config
from fastssl.step.loss_scale import INITIAL_LOSS_SCALE
from fastssl.step.train_step import TrainStep
from pipelines.batch import Batch
from tests.helpers.group_counts import AdamByGroup

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")


@pytest.fixture(scope="module", autouse=True)
def one_process_alone():
    """A process group of this process, and none of it left for the tests that come after."""
    before = {name: os.environ.pop(name, None) for name in RANK_VARIABLES}
    yield
    import deepspeed.comm.comm

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    deepspeed.comm.comm.cdb = None
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


LEARNING_RATE = 0.1
TINY = {"channels": [8, 8, 16, 16], "layers": [1, 1, 1, 1]}


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, fused=True)


def build(zero_stage=0, precision="fp32", loss="minc", build_optimizer=sgd, **train):
    """A small objective with batch norm, a target and a moment, its engine and its steps."""
    import deepspeed

    cfg = build_config(
        {
            "data": {"global_batch_size": 8},
            "model": {"backbone": "timm/resnet18", "stem": "cifar", "backbone_kwargs": TINY, "projector_dim": 8},
            "loss": {"name": loss},
            "train": {"zero_stage": zero_stage, "precision": precision, **train},
            "run": {"device": "cpu", "num_threads": 1},
        }
    )
    start_process(cfg.run)
    torch.manual_seed(0)
    objective = Objective(TwoViewModel(cfg.model, 16), build_loss(cfg.loss, 8))
    optimizer = build_optimizer(objective.parameters())
    config = build_ds_config(cfg, world_size=1)
    engine, *_ = deepspeed.initialize(model=objective, optimizer=optimizer, config=config, dist_init_required=False)
    engine.enable_backward_allreduce = zero_stage > 0
    names = ("loss", "grad_norm", "num_steps")
    sums = {name: torch.zeros((), dtype=torch.float64) for name in names}
    return TrainStep(cfg, engine, objective, probe=None, is_holdout=None, sums=sums), objective


def take(steps, step, bad=False):
    torch.manual_seed(step)
    views = [torch.randn(8, 3, 16, 16) for _ in range(2)]
    if bad:
        views[0][3, 0, 0, 0] = torch.inf
    batch = Batch(views=views, labels=torch.zeros(8, dtype=torch.long), sample_ids=torch.arange(8))
    result = steps.run(batch, learning_rate=LEARNING_RATE, target_momentum=0.9)
    return result.grad_norm.item() if result.taken else None


def state_of(steps, objective):
    base = steps._engine.optimizer if not steps._engine.zero_optimization() else steps._engine.optimizer.optimizer
    momenta = [state["momentum_buffer"] for state in base.state.values() if "momentum_buffer" in state]
    return copy.deepcopy([*objective.state_dict().values(), *momenta])


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_a_step_that_is_not_finite_changes_nothing(zero_stage):
    steps, objective = build(zero_stage)
    for step in range(2):
        assert take(steps, step) > 0
    before = state_of(steps, objective)
    assert take(steps, 2, bad=True) is None
    after = state_of(steps, objective)
    assert len(before) == len(after)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))

    undisturbed, other = build(zero_stage)
    for step in range(2):
        take(undisturbed, step)
    assert take(steps, 3) == take(undisturbed, 3)
    later = zip(state_of(steps, objective), state_of(undisturbed, other), strict=True)
    assert all(torch.equal(a, b) for a, b in later)
    assert all(a.isfinite().all() for a in state_of(steps, objective))


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_a_step_that_is_not_finite_is_not_counted_by_an_optimizers_groups(zero_stage):
    steps, _ = build(zero_stage, build_optimizer=lambda parameters: AdamByGroup(parameters, lr=0.01))
    (group,) = steps._engine.optimizer.param_groups
    assert take(steps, 0, bad=True) is None
    assert "step" not in group
    assert take(steps, 1) > 0
    assert take(steps, 2, bad=True) is None
    assert group["step"] == 1
    assert take(steps, 3) > 0
    assert group["step"] == 2


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_the_gradient_is_clipped_to_its_norm(zero_stage):
    """One step of SGD without momentum's past is lr times the gradient."""
    for clip, wanted in ((0.0, None), (1e-3, 1e-3)):
        steps, objective = build(zero_stage, grad_clip_norm=clip)
        before = torch.cat([p.detach().flatten().clone() for p in objective.parameters() if p.requires_grad])
        norm = take(steps, 0)
        after = torch.cat([p.detach().flatten() for p in objective.parameters() if p.requires_grad])
        moved = (before.double() - after.double()).norm().item() / 0.1
        assert moved == pytest.approx(
            wanted or norm, rel=2e-3
        )  # weights of .1 hold steps of 1e-6 to 1e-2 of themselves


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_fp16_finds_a_scale_and_the_gradient_does_not_depend_on_it(zero_stage):
    norms = {}
    for scale in (INITIAL_LOSS_SCALE, 2.0**10):
        steps, _ = build(zero_stage, "fp16", grad_clip_norm=0.5)
        steps.update.loss_scale.cur_scale = scale
        while (norm := take(steps, 0)) is None:
            assert steps.update.loss_scale.cur_scale >= 1
        norms[scale] = norm
    full = take(build(zero_stage, grad_clip_norm=0.5)[0], 0)
    # 2^-11 each rounding; through the tiny network's layers a few per mille. A wrong scale is off by 2 at the least.
    assert norms[INITIAL_LOSS_SCALE] == pytest.approx(norms[2.0**10], rel=2e-2)
    assert norms[2.0**10] == pytest.approx(full, rel=2e-2)


def test_an_overflow_halves_the_scale_and_the_state_goes_on():
    steps, objective = build(0, "fp16")
    steps.update.loss_scale.cur_scale = 2.0**40
    before = state_of(steps, objective)
    assert take(steps, 0) is None
    assert steps.update.loss_scale.cur_scale == 2.0**39
    assert all(torch.equal(a, b) for a, b in zip(before, state_of(steps, objective), strict=True))
    other, _ = build(0, "fp16")
    assert other.update.is_searching
    other.update.load_state_dict(steps.update.state_dict())
    assert other.update.state_dict() == steps.update.state_dict()
    assert other.update.loss_scale.cur_scale == 2.0**39
    assert other.update.loss_scale.last_overflow_iter == 0


def test_the_search_for_a_scale_ends_with_the_first_step_and_goes_no_further_than_the_least():
    """Steps that are skipped in it are nobody's fault; later ones are counted against train.max_skipped_steps."""
    steps, _ = build(0, "fp16")
    assert steps.update.is_searching
    while take(steps, 0) is None:
        assert steps.update.is_searching
    assert not steps.update.is_searching
    steps.update.loss_scale.cur_scale = 2.0**40
    assert take(steps, 0) is None
    assert not steps.update.is_searching

    hopeless, _ = build(0, "fp16")
    num_skipped = 0
    while hopeless.update.is_searching:
        assert take(hopeless, 0, bad=True) is None
        num_skipped += 1
    assert hopeless.update.loss_scale.cur_scale == 1
    assert num_skipped == 16  # from 2^16
    assert not build(0)[0].update.is_searching


@pytest.mark.parametrize(
    ("zero_stage", "owner", "name"),
    [(0, "DeepSpeedEngine", "skipped_steps"), (1, "DeepSpeedZeroOptimizer", "round_robin_bit16_offsets")],
)
def test_an_engine_without_an_attribute_that_is_needed_is_refused(zero_stage, owner, name):
    engine = build(zero_stage)[0]._engine
    check_engine(engine)
    delattr(engine.optimizer if zero_stage else engine, name)
    with pytest.raises(UserError, match=rf"^deepspeed .* does not have deepspeed.{owner}.{name}, which fastssl uses: "):
        check_engine(engine)
