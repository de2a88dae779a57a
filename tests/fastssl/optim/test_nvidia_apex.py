"""NVIDIA apex is told from other projects and broken builds; where it is, its kernels do what torch's do.

Detection runs in a process of its own on folders that are no apex: what is tested there is what we say of them.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fastssl.models.config import ModelConfig
from fastssl.models.two_view import TwoViewModel
from fastssl.optim import OptimConfig, build_optimizer
from fastssl.optim.nvidia_apex import apex_layer_norm, put_layer_norms, why_no_apex

WHY_NO_APEX = why_no_apex()
needs_apex = pytest.mark.skipif(
    bool(WHY_NO_APEX) or not torch.cuda.is_available(), reason=WHY_NO_APEX or "apex's kernels need a GPU"
)
DETECT = """
import importlib, sys
from fastssl.optim.nvidia_apex import why_no_apex
for folder in sys.argv[1:]:
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    print(why_no_apex())
    sys.path.remove(folder)
"""


def write_package(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_what_is_no_apex_is_named(tmp_path):
    never = "raise SystemExit('imported')"
    summary = "Metadata-Version: 2.1\nName: apex\nVersion: 0.9.10\nSummary: A toolkit for web frameworks\n"
    folders = [
        write_package(tmp_path / "other", {"apex/__init__.py": never, "apex-0.9.10.dist-info/METADATA": summary}),
        write_package(tmp_path / "file", {"apex.py": never}),
        write_package(tmp_path / "python_only", {"apex/__init__.py": never, "apex/optimizers/__init__.py": ""}),
        write_package(
            tmp_path / "broken",
            {
                "apex/__init__.py": "raise ImportError('undefined symbol: _ZN')",
                "apex/optimizers/__init__.py": "",
                "amp_C.py": "",
            },
        ),
    ]
    done = subprocess.run([sys.executable, "-c", DETECT, *map(str, folders)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    other, file, python_only, broken = done.stdout.splitlines()
    assert f"{folders[0] / 'apex'} is not NVIDIA apex but another project of that name (A toolkit for web" in other
    assert f"{folders[1] / 'apex.py'} is not NVIDIA apex" in file
    assert "without its CUDA extensions" in python_only
    assert "cannot be imported (undefined symbol: _ZN)" in broken
    for line in (other, file, python_only, broken):
        assert "https://github.com/NVIDIA/apex" in line


class OtherNorm(nn.Module):
    """Takes torch's arguments, and computes something else, so that it shows where it stands."""

    def __init__(self, normalized_shape: tuple[int, ...], eps: float, elementwise_affine: bool) -> None:
        super().__init__()
        self.settings = (normalized_shape, eps, elementwise_affine)
        self.weight: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None


def test_layer_norms_are_replaced_and_parameters_keep_their_names():
    small = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
    cfg = ModelConfig(backbone="timm/vit_tiny_patch16_224", backbone_kwargs=small, projector_hidden=(8,))
    model = TwoViewModel(cfg, image_px=16).eval()
    before = dict(model.named_parameters())
    assert put_layer_norms(model, OtherNorm) == 5  # two a block, one at the end
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(after[name] is before[name] for name in before)
    norm = model.backbone.get_submodule("blocks.1.norm2")
    assert isinstance(norm, OtherNorm)
    assert norm.settings == ((32,), 1e-6, True)
    assert not norm.training


def test_layer_norms_that_do_something_else_stay():
    from timm.layers import LayerNorm2d

    model = nn.Sequential(LayerNorm2d(4), nn.LayerNorm(4, bias=False), nn.LayerNorm(4, elementwise_affine=False))
    assert put_layer_norms(model, OtherNorm) == 1
    assert [type(module) for module in model] == [LayerNorm2d, nn.LayerNorm, OtherNorm]
    assert put_layer_norms(nn.Sequential(nn.BatchNorm2d(4)), OtherNorm) == 0


def parameters(device: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(5, 7)).to(device)


def take_steps(name: str, impl: str, device: str = "cuda") -> list[torch.Tensor]:
    cfg = OptimConfig(name=name, impl=impl, base_lr=0.05, weight_decay=0.01)
    model = parameters(device)
    optimizer = build_optimizer(model, cfg)
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator).to(device)
        optimizer.step()
    return [p.detach() for p in model.parameters()]


@needs_apex
@pytest.mark.gpu
@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb"])
def test_apex_takes_the_steps_of_torch(name):
    for own, apex in zip(take_steps(name, "torch"), take_steps(name, "apex"), strict=True):
        torch.testing.assert_close(apex, own, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch's fused optimizers are chosen on a GPU")
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_fused_optimizers_take_the_steps_of_the_default(name):
    assert build_optimizer(parameters("cuda"), OptimConfig(name=name)).defaults["fused"] is True
    for default, fused in zip(take_steps(name, "torch"), take_steps(name, "auto"), strict=True):
        torch.testing.assert_close(fused, default, rtol=1e-5, atol=1e-6)


@needs_apex
@pytest.mark.gpu
def test_apex_layer_norm_is_that_of_torch():
    torch.manual_seed(0)
    norm = nn.LayerNorm(33).cuda()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(17, 33, device="cuda", requires_grad=True)
    model = nn.Sequential(norm)
    grads = []
    for _ in range(2):
        y = model(x)
        grads.append([y.detach(), *torch.autograd.grad(y.square().sum(), [x, norm.weight, norm.bias])])
        put_layer_norms(model, apex_layer_norm())
    assert type(model[0]) is apex_layer_norm()
    for torchs, apexs in zip(*grads, strict=True):
        torch.testing.assert_close(apexs, torchs, rtol=1e-4, atol=1e-4)
