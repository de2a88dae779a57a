"""The imports of a training, for a process that is forked repeatedly."""

# ruff: noqa: F401
import deepspeed
import torch.utils.tensorboard

import fastssl.trainer
import kernels.augment.cpu
import pipelines.engines.ffcv
