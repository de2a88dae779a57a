"""LAMB: Adam with layer-wise scaled steps."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fastssl.machine.private_api import foreach
from fastssl.optim.layerwise import LayerwiseOptimizer, Partition, WholeLayers, move


class Lamb(LayerwiseOptimizer):
    """AdamW whose step is scaled to the norm of the layer's weights; correct under ZeRO 1 and 2.

    You et al. 2020, arXiv:1904.00962, algorithm 2 with phi the identity, for each layer with weights w, gradient g, at
    step t from 1:

        m <- beta1 m + (1 - beta1) g             v <- beta2 v + (1 - beta2) g^2
        u = (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps) + decay w
        w <- w - lr |w| / |u| u                  |w| / |u| is 1 where either is 0

    timm's Lamb gives the same numbers with max_grad_norm=None; for clipping, use `train.grad_clip_norm`. Groups with
    "adapt" False (biases and norm parameters) use w <- w - lr u.

    State per parameter: "exp_avg", m, and "exp_avg_sq", v, of its shape (under ZeRO, of the flat partition's), and
    "step", t, a 0-dim fp32 tensor on the parameter's device.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        eps: float = 1e-6,
    ) -> None:
        """Create from parameters or groups; the default eps is that of the authors' code."""
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": eps})

    def _step_group(self, group: dict[str, Any], params: list[Tensor], layers: WholeLayers | Partition) -> None:
        weights, grads = layers.cut(params), layers.cut([p.grad for p in params if p.grad is not None])
        steps = [self._count_step(p) for p in params]
        if len(steps) != len(weights):
            steps *= len(weights)  # fragments of one flat parameter
        averages, squares = (layers.cut(self._state_of(name, params)) for name in ("exp_avg", "exp_avg_sq"))
        updates = _adam_updates(group, grads, averages, squares, steps)
        foreach.add_(updates, weights, alpha=group["weight_decay"])
        if group["adapt"]:
            w, u = layers.norms(weights, updates).unbind(1)
            ratios = torch.where((w > 0) & (u > 0), w / u, 1.0)
            foreach.mul_(updates, list(ratios.unbind()))
        move(weights, updates, group["lr"])

    def _count_step(self, param: Tensor) -> Tensor:
        state = self.state[param]
        step = state.get("step")
        if step is None or step.device != param.device:  # checkpoints keep it on the CPU
            step = state["step"] = torch.zeros((), device=param.device) if step is None else step.to(param.device)
        step += 1
        return step


def _adam_updates(
    group: dict[str, Any], grads: list[Tensor], averages: list[Tensor], squares: list[Tensor], steps: list[Tensor]
) -> list[Tensor]:
    """Update both averages; return m_hat / (sqrt(v_hat) + eps) of each."""
    beta1, beta2 = group["betas"]
    foreach.lerp_(averages, grads, 1 - beta1)
    foreach.mul_(squares, beta2)
    foreach.addcmul_(squares, grads, grads, 1 - beta2)
    denominators = foreach.sqrt(squares)
    step = torch.stack(steps).double()  # 1 - .999 loses too many digits in fp32
    foreach.div_(denominators, list((1 - beta2**step).sqrt().float().unbind()))
    foreach.add_(denominators, group["eps"])
    updates = foreach.div(averages, list((1 - beta1**step).float().unbind()))
    foreach.div_(updates, denominators)
    return list(updates)
