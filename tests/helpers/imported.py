"""The imports of a training, for a process that is forked repeatedly."""

# ruff: noqa: F401, I001
import torch._dynamo  # the first optimizer imports it
import torch.utils.tensorboard

import fastssl.trainer
import kernels.augment.cpu
import pipelines.engines.ffcv
import timm  # after fastssl, which makes torchvision importable with a CPU-only torch
from fastssl.machine.private_api import import_deepspeed

import_deepspeed()
