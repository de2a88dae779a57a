"""The imports of a training, for a process that is forked repeatedly."""

# ruff: noqa: F401, I001
import deepspeed
import torch.utils.tensorboard

import fastssl.trainer
import kernels.augment.cpu
import pipelines.engines.ffcv
import timm  # after fastssl, which makes torchvision importable with a CPU-only torch
