"""A tiny but complete training step without DeepSpeed: batch norm, a probe with held-out samples, epoch sums."""

import torch

from fastssl.build_run import build_objective
from fastssl.config import build_config
from fastssl.evaluation.config import EvalConfig
from fastssl.evaluation.probe import OnlineProbe
from fastssl.losses import build_loss
from fastssl.models.objective import Objective
from fastssl.models.two_view import TwoViewModel
from fastssl.optim import build_optimizer
from fastssl.step.train_step import TrainStep
from pipelines.batch import Batch

BACKBONE = {"backbone": "timm/resnet18", "stem": "cifar", "projector_hidden": [8], "projector_dim": 8}
BACKBONE |= {"backbone_kwargs": {"channels": [4, 4, 8, 8], "layers": [1, 1, 1, 1]}}
NUM_STEPS = 7
OPTIMIZERS = {"sgd": 0.1, "adamw": 1e-3, "lars": 0.1, "lamb": 1e-2}


class FakeEngine:
    """The parts of the engine that a `TrainStep` uses when it bypasses DeepSpeed."""

    enable_backward_allreduce = False
    global_steps = micro_steps = global_samples = 0

    def __init__(self, optimizer, device):
        self.optimizer, self.device = optimizer, device

    def zero_optimization(self):
        return False

    def train_batch_size(self):
        return 8


def build(loss="mio", optimizer="sgd", precision="fp32", clip=0.0, momentum=0.9, device="cpu"):
    """Build a new step as the trainer does; return it with its objective, engine and probe."""
    device = torch.device(device)
    cfg = build_config(
        {
            "model": BACKBONE,
            "loss": {"name": loss},
            "optim": {"name": optimizer, "momentum": momentum},
            "train": {"precision": precision, "grad_clip_norm": clip},
            "data": {"global_batch_size": 8},
        }
    )
    torch.manual_seed(0)
    model = TwoViewModel(cfg.model, 16)
    objective = build_objective(cfg, model, build_loss(cfg.loss, 8)).to(device)
    assert isinstance(objective, Objective)
    if device.type == "cuda":
        objective.to(memory_format=torch.channels_last)
    engine = FakeEngine(build_optimizer(objective, cfg.optim), device)
    probe = OnlineProbe(model.num_features, 4, EvalConfig()).to(device)
    is_holdout = torch.arange(32, device=device) % 4 == 0
    names = ("loss", "grad_norm", "num_steps", *OnlineProbe.COUNTS)
    sums = {name: torch.zeros((), dtype=torch.float64, device=device) for name in names}
    return TrainStep(cfg, engine, objective, probe=probe, is_holdout=is_holdout, sums=sums), objective, engine, probe


def batch_of(step, bad=False, device="cpu"):
    """The batch of step `step` (from 0), equal on every device; a bad one makes every gradient infinite or NaN."""
    generator = torch.Generator().manual_seed(step)
    views = [torch.randn(8, 3, 16, 16, generator=generator) for _ in range(2)]
    views = [view.contiguous(memory_format=torch.channels_last) for view in views]
    if bad:
        views[0][3, 0, 0, 0] = torch.inf
    ids = torch.randint(0, 32, (8,), generator=generator)
    views, ids = [view.to(device) for view in views], ids.to(device)
    return Batch(views=views, labels=ids % 4, sample_ids=ids)


def rates_of(step, optimizer):
    """The other arguments of `TrainStep.run`, different in each step."""
    return {"learning_rate": OPTIMIZERS[optimizer] * (step + 1) / NUM_STEPS, "target_momentum": 0.9 + 0.01 * step}
