"""A linear probe trained alongside pre-training on detached features, so that it does not affect the encoder."""

# B local batch, V views, F features, C classes

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fastssl import collectives
from fastssl.evaluation.config import EvalConfig
from fastssl.optim.skipping import prepare_state, skipped_unless


class OnlineProbe(nn.Module):
    """Linear classifier on detached fp32 features, with its own SGD (momentum .9, no weight decay).

    It is trained on the labelled samples outside of the hold-out and scored on those inside, so its accuracy does not
    measure memorised samples. The state dict includes the optimizer state.
    """

    COUNTS = ("online_correct", "online_total")  # keys of the counts that `step` returns

    def __init__(self, num_features: int, num_classes: int, cfg: EvalConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(num_features, num_classes)
        self.optimizer = torch.optim.SGD(self.linear.parameters(), lr=cfg.probe_lr, momentum=0.9, fused=True)

    def step(self, h: list[Tensor], labels: Tensor, is_holdout: Tensor, taken: Tensor) -> dict[str, Tensor]:
        """Score one batch, then train on it. Copies nothing to the host.

        Args:
            h: V features [B, F], of any precision; detached inside.
            labels: int64 [B]; samples with -1 (no label) are ignored.
            is_holdout: bool [B].
            taken: bool, 0-dim: False leaves the classifier unchanged.

        Returns:
            Scalars of this rank with the keys of COUNTS, over the views of the hold-out samples.
        """
        features = torch.cat([view.detach() for view in h]).float()
        labels, is_holdout = labels.repeat(len(h)), is_holdout.repeat(len(h))
        is_labelled = labels >= 0
        with torch.autocast(features.device.type, enabled=False):  # otherwise forward and backward run in low precision
            logits = self.linear(features)
            losses = cross_entropy(logits, labels, reduction="none", ignore_index=-1)
            self._learn(losses, is_labelled & ~is_holdout, taken)
        is_scored = is_labelled & is_holdout
        is_correct = (logits.detach().argmax(1) == labels) & is_scored
        return dict(zip(self.COUNTS, (is_correct.sum(), is_scored.sum()), strict=True))

    def _learn(self, losses: Tensor, learns: Tensor, taken: Tensor) -> None:
        # Sums and counts are averaged over the ranks first and divided afterwards: this is the exact gradient of the
        # mean over the global batch, however unevenly the hold-out is distributed over the ranks.
        parameters = list(self.linear.parameters())
        gradients = torch.autograd.grad(torch.where(learns, losses, 0.0).sum(), parameters)
        flat = torch.cat([*(gradient.flatten() for gradient in gradients), learns.sum().float()[None]])
        collectives.all_mean_(flat)
        mean = flat[:-1] / flat[-1].clamp(min=1e-6)  # without samples the sum is also zero
        for parameter, gradient in zip(parameters, mean.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = gradient.view_as(parameter)
        if not self.optimizer.state:
            prepare_state(self.optimizer)
        with skipped_unless(taken, self.optimizer, None):
            self.optimizer.step()
        for parameter in parameters:
            parameter.grad = None

    def get_extra_state(self) -> dict[str, Any]:
        """The optimizer's state, for `state_dict`."""
        return self.optimizer.state_dict()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Load the optimizer's state, for `load_state_dict`."""
        self.optimizer.load_state_dict(state)
        for group in self.optimizer.param_groups:
            group["fused"] = True
