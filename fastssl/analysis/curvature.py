"""Hessian-vector products of a loss with respect to all trained parameters of a run, by double backward.

# P parameters of the run: encoder, projector and those of the loss (a predictor, a temperature)
# g(w) the gradient of the mean loss over fixed batches; H v = d/dw (g(w) . v), Pearlmutter 1994

Quantities that a loss uses without gradient (sg) are constants here, at their values for the current weights: H is then
the Hessian of a scalar function, and symmetric. If sg covers a part of the network (`HELD`), H is not the Jacobian of
the gradient field that training follows, which need not be symmetric; it is the curvature of the loss given those
constants.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from fastssl.config import Config
from fastssl.errors import ConfigError, UserError
from fastssl.losses import Loss, LossConfig, MincConfig, build_loss
from fastssl.models.objective import Objective
from kernels.similarity import Impl

HELD = {
    "byol": "the target network",
    "linear_byol": "the target network",
    "simsiam": "the other view's projection",
    "minc": "the target network and Lambda",
    "tico": "the target network and C",
    "dclw": "the weights of the positives",
}


def twice_differentiable(cfg: Config) -> Config:
    """The same configuration with a twice differentiable loss: sums over pairs use `impl="reference"`.

    Raises:
        ConfigError: the loss's gradient is not the gradient of a function, or its surrogate has a different second
            derivative.
    """
    loss = cfg.loss
    if isinstance(loss, MincConfig) and loss.gha:
        raise ConfigError(
            "loss.gha: the update of MINC with gha is not the gradient of a function, so it has no Hessian"
        )
    if isinstance(loss, MincConfig) and loss.alpha != 2:
        raise ConfigError(
            f"loss.alpha is {loss.alpha:g}: below loss.alpha_floor its gradient is an approximation without a Hessian; "
            "only loss.alpha=2 has one"
        )
    return replace(cfg, loss=with_impl(loss, "reference"))


def with_impl(config: LossConfig, impl: Impl) -> LossConfig:
    """The same loss with other kernels, if it has an `impl` setting."""
    return replace(config, impl=impl) if hasattr(config, "impl") else config


def rebuild_loss(loss: Loss, config: LossConfig, width: int) -> Loss:
    """Build a loss from another configuration with the state of this one, on its device.

    Args:
        loss: The loss of a run.
        config: A configuration with the same parameters and buffers.
        width: D.
    """
    rebuilt, state = build_loss(config, width), loss.state_dict()
    rebuilt.load_state_dict(state)
    return rebuilt.to(next(iter(state.values())).device) if state else rebuilt


def held_fixed(loss: LossConfig) -> str:
    """Description of what, besides the images, is constant in a loss's Hessian; "nothing" for most losses."""
    return HELD.get(loss.name, "nothing")


class LossHessian:
    """Hessian-vector products of an objective's mean loss over batches.

    Attributes:
        parameters: The trained parameters, in the order of `objective.parameters()`.
        size: P.
    """

    def __init__(self, objective: Objective, batches: Sequence[list[Tensor]], seed: int = 0) -> None:
        """Use an objective and batches from `fastssl.analysis.source`.

        Args:
            objective: Its calls must not change buffers (`hold_still`); its loss must be `twice_differentiable`.
            batches: Views of each batch; all batches have the same number of images.
            seed: Seed of dropout and other randomness, which is the same in every product.
        """
        self.objective, self.batches, self._seed = objective, batches, seed
        self.parameters = [p for p in objective.parameters() if p.requires_grad]
        self.size = sum(p.numel() for p in self.parameters)

    def loss_and_gradient(self) -> tuple[float, Tensor]:
        """The mean loss and its gradient [P]."""
        value, gradient = 0.0, self._zeros()
        for number in range(len(self.batches)):
            loss = self._loss(number)
            value += float(loss.detach()) / len(self.batches)
            gradient += self._flat(torch.autograd.grad(loss, self.parameters, materialize_grads=True))
        return value, gradient / len(self.batches)

    def product(self, v: Tensor) -> Tensor:
        """H v [P] for v [P]: a second backward pass through the gradient of every batch.

        Raises:
            UserError: the product is not finite, for example because a projection is 0 and cannot be normalised.
        """
        pieces = v.split([p.numel() for p in self.parameters])
        product = self._zeros()
        for number in range(len(self.batches)):
            grads = torch.autograd.grad(self._loss(number), self.parameters, create_graph=True, materialize_grads=True)
            slope = torch.stack([g.flatten() @ piece for g, piece in zip(grads, pieces, strict=True)]).sum()
            product += self._flat(torch.autograd.grad(slope, self.parameters, materialize_grads=True))
        if not torch.isfinite(product).all():
            raise UserError(
                "the Hessian is not finite at these weights: a projection has length 0, or the loss exceeds the "
                "range of fp32"
            )
        return product / len(self.batches)

    def _loss(self, number: int) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed + number)
            return self.objective(self.batches[number])[2]

    def _zeros(self) -> Tensor:
        return self.parameters[0].new_zeros(self.size)

    def _flat(self, tensors: Sequence[Tensor]) -> Tensor:
        return parameters_to_vector([x.detach().contiguous() for x in tensors])
