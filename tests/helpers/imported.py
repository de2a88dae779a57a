"""The imports of a training, for a process that is forked repeatedly."""

# ruff: noqa: E402, F401
from kernels.torchvision_cpu import import_torchvision

import_torchvision()  # before timm

import deepspeed
import timm
import torch.utils.tensorboard

import fastssl.trainer
import kernels.augment.cpu
import pipelines.engines.ffcv
