"""Adam that stores its step count where NVIDIA apex's optimizers do; apex itself runs on GPUs only."""

from typing import Any

import torch


class AdamByGroup(torch.optim.Optimizer):
    """One count per group, in `param_groups` and not in the state, incremented at each step even without gradients."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            corrections = [1 - beta ** group["step"] for beta in group["betas"]]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state |= {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                state["exp_avg"].lerp_(p.grad, 1 - group["betas"][0])
                state["exp_avg_sq"].lerp_(p.grad.square(), 1 - group["betas"][1])
                scale = (state["exp_avg_sq"] / corrections[1]).sqrt_().add_(group["eps"])
                p.addcdiv_(state["exp_avg"], scale, value=-group["lr"] / corrections[0])
