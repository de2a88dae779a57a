"""LARS, layer-wise adaptive rate scaling, with the learning rate outside of the momentum."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fastssl.machine.private_api import foreach
from fastssl.optim.layerwise import LayerwiseOptimizer, Partition, WholeLayers, move


class Lars(LayerwiseOptimizer):
    """SGD with momentum and layer-wise scaled steps; correct under ZeRO 1 and 2.

    You et al. 2017, arXiv:1708.03888, eq. 6, for each layer with weights w and gradient g:

        ratio = eta |w| / (|g| + decay |w| + eps)        1 where |w| or |g| is 0
        v <- momentum v + ratio (g + decay w)
        w <- w - lr v

    Their algorithm 1 has the learning rate inside v. Here it is outside, as in torch's SGD and in Goyal et al. 2017,
    arXiv:1706.02677, eq. 9: a change of the learning rate then applies to all of v at once. timm's Lars gives the same
    numbers. Groups with "adapt" False (biases and norm parameters) use ratio = 1.

    State per parameter, if momentum > 0: "momentum_buffer", v, of its shape (under ZeRO, of the flat partition's).
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        eps: float = 1e-8,
    ) -> None:
        """Create from parameters or groups; trust_coefficient is eta."""
        settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, settings | {"trust_coefficient": trust_coefficient, "eps": eps})

    def _step_group(self, group: dict[str, Any], params: list[Tensor], layers: WholeLayers | Partition) -> None:
        weights, grads = layers.cut(params), layers.cut([p.grad for p in params if p.grad is not None])
        updates = foreach.add(grads, weights, alpha=group["weight_decay"])
        if group["adapt"]:
            ratios = _trust_ratios(layers.norms(weights, grads), group)
            foreach.mul_(updates, list(ratios.unbind()))
        if group["momentum"]:
            velocities = layers.cut(self._state_of("momentum_buffer", params))
            foreach.mul_(velocities, group["momentum"])
            foreach.add_(velocities, updates)
            updates = velocities
        move(weights, list(updates), group["lr"])


def _trust_ratios(norms: Tensor, group: dict[str, Any]) -> Tensor:
    """Trust ratio of each layer, [F], from |w| and |g|, [F, 2]."""
    w, g = norms.unbind(1)
    ratios = group["trust_coefficient"] * w / (g + w * group["weight_decay"] + group["eps"])
    return torch.where((w > 0) & (g > 0), ratios, 1.0)
