"""Cases of the fused pixel op: in Triton's interpreter (test_fused.py) or on a GPU (test_fused_gpu.py)."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as v2

from kernels.augment import StoredImages, augment, fused
from kernels.augment.ops.jitter import BRIGHTNESS, CONTRAST, HUE, SATURATION
from pipelines.views import RECIPES, ViewSpec, draw
from tests.helpers.view_records import jitter, make_records

IDENTITY: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
IMAGENET: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
# In levels of 255, as for numba (test_augment.py), whose formulas these are.
EXACT_LEVELS = 6e-5  # a GPU may fuse a product and a sum
HUE_LEVELS = 5e-4
BLUR_LEVELS = 1.2e-3
AFFINE_LEVELS = 0.0127
SIDES_PX = [
    (1, 1),
    (9, 7),
    pytest.param((2, 5), marks=pytest.mark.slow),
    pytest.param((20, 33), marks=pytest.mark.slow),
]


pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")


@pytest.fixture(autouse=True)
def _several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small enough that a small view is several blocks of rows and a row of blocks several steps."""
    monkeypatch.setattr(fused, "BLOCK_ROWS", 8)
    monkeypatch.setattr(fused, "BLOCK_PX", 256)
    monkeypatch.setattr(fused, "NUM_WARPS", 4)


def make_views(num: int, height_px: int, width_px: int) -> np.ndarray:
    """Noise, one colour, greys, black and white: uint8 [num, 1, H, W, 3]."""
    rng = np.random.default_rng(0)
    views = rng.integers(0, 256, (num, 1, height_px, width_px, 3), dtype=np.uint8)
    views[1::4] = (200, 31, 90)
    views[2::4] = views[2::4, ..., :1]
    views[3::4] = views[3::4] // 128 * 255
    return views


def run_fused(views: np.ndarray, params: np.ndarray, device: str, **options: Any) -> list[torch.Tensor]:
    return augment(torch.from_numpy(views).to(device), params, impl="fused", **(IDENTITY | options))


def max_difference_levels(views: np.ndarray, params: np.ndarray, device: str) -> float:
    ours, reference = run_fused(views, params, device), augment(views, params, impl="reference", **IDENTITY)
    return 255 * max(float((a.cpu() - b).abs().max()) for a, b in zip(ours, reference, strict=True))


ROTATED = np.float32([0.79, 0.45, -1.2, -0.45, 0.79, 3.1])
OPS: dict[str, tuple[float, dict[str, Any]]] = {
    "nothing": (0.0, {}),
    "flip": (0.0, {"flip": True}),
    "brightness": (EXACT_LEVELS, jitter(BRIGHTNESS, 1.4)),
    "contrast": (EXACT_LEVELS, jitter(CONTRAST, 0.6)),
    "saturation": (EXACT_LEVELS, jitter(SATURATION, 2.0)),
    "hue": (HUE_LEVELS, jitter(HUE, 0.3)),
    "hue the other way": (HUE_LEVELS, jitter(HUE, -0.5)),
    "grayscale": (EXACT_LEVELS, {"grayscale": True}),
    "small blur": (BLUR_LEVELS, {"blur_sigma": 0.3, "blur_kernel_px": 23}),
    "blur": (BLUR_LEVELS, {"blur_sigma": 1.2, "blur_kernel_px": 9}),
    "solarize": (0.0, {"solarize": True, "solarize_threshold": 128 / 255}),
    "affine": (AFFINE_LEVELS, {"affine": True, "affine_matrix": ROTATED}),
    "affine and flip": (AFFINE_LEVELS, {"affine": True, "affine_matrix": ROTATED, "flip": True}),
}


@pytest.mark.parametrize("size_px", SIDES_PX, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_each_op(name: str, size_px: tuple[int, int], device: str) -> None:
    limit, fields = OPS[name]
    assert max_difference_levels(make_views(4, *size_px), make_records(4, **fields), device) <= limit


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2), (1, 2, 3, 0)])
def test_jitter_in_its_drawn_order(order: tuple[int, ...], device: str) -> None:
    """Strong factors: the clamps make the order visible. Contrast takes its mean after what comes before it."""
    params = make_records(4, jitter=True, jitter_order=order, jitter_factor=(1.8, 1.7, 2.0, 0.3))
    assert max_difference_levels(make_views(4, 9, 14), params, device) <= BLUR_LEVELS


@pytest.mark.parametrize(
    "recipe", ["byol", *(pytest.param(name, marks=pytest.mark.slow) for name in ("simclr", "digits"))]
)
def test_recipes(recipe: str, device: str) -> None:
    specs = [replace(spec, size_px=16) for spec in RECIPES[recipe]]
    params = draw(specs, 3, 0, np.arange(6), np.full((6, 2), 16))
    views = np.concatenate([make_views(6, 16, 16), make_views(6, 16, 16)[::-1]], 1)
    assert max_difference_levels(views, params, device) <= (AFFINE_LEVELS if recipe == "digits" else BLUR_LEVELS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_normalised_cast_and_channels_last(dtype: torch.dtype, device: str) -> None:
    views, params = make_views(4, 6, 9), make_records(4, flip=True)
    (ours,) = run_fused(views, params, device, dtype=dtype, **IMAGENET)
    (reference,) = augment(views, params, impl="reference", dtype=dtype, **IMAGENET)
    assert ours.dtype == dtype
    assert ours.shape == (4, 3, 6, 9)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ours.cpu(), reference, rtol=torch.finfo(dtype).eps, atol=5e-7)


@pytest.mark.slow
def test_the_same_bits_whatever_the_batch(device: str) -> None:
    spec = ViewSpec(size_px=12, blur_p=0.5, solarize_p=0.5)
    params = draw((spec,), 1, 0, np.arange(3), np.full((3, 2), 12))
    views = make_views(3, 12, 12)
    (together,), (again,) = run_fused(views, params, device), run_fused(views, params, device)
    assert torch.equal(together, again)
    for i in (0, 2):
        (alone,) = run_fused(views[i : i + 1], params[i : i + 1], device)
        assert torch.equal(alone[0], together[i])


def test_views_that_are_slices(device: str) -> None:
    views, params = make_views(6, 8, 8), make_records(3, flip=True)
    tensor = torch.from_numpy(views).to(device)[::2]
    assert not tensor.is_contiguous()
    (ours,) = augment(tensor, params, **IDENTITY)
    (expected,) = run_fused(np.ascontiguousarray(views[::2]), params, device)
    assert torch.equal(ours, expected)


def test_an_empty_batch(device: str) -> None:
    assert run_fused(make_views(0, 8, 8), make_records(0), device)[0].shape == (0, 3, 8, 8)


@pytest.mark.parametrize(
    ("image_px", "size_px"),
    [((12, 12), 12), *(pytest.param(*each, marks=pytest.mark.slow) for each in (((21, 14), 12), ((9, 17), 7)))],
    ids=str,
)
def test_views_cut_from_stored_images(image_px: tuple[int, int], size_px: int, device: str) -> None:
    """The nearest level of what torchvision's antialiased filter gives in fp64; ops as on views cut before."""
    images, ids = make_views(10, *image_px)[:, 0], np.array([3, 8, 0])
    spec = ViewSpec(size_px=size_px, crop_scale=(0.08, 1.0), flip_p=0.0, grayscale_p=0.0, jitter_p=0.0)
    params = draw((spec, spec), 3, 1, ids, np.tile(image_px, (3, 1)))
    params["crop_box"][0, 0] = (0, 0, *image_px)
    stored = StoredImages(torch.from_numpy(images).to(device), torch.from_numpy(ids).to(device), size_px)
    levels = 255 * torch.stack([view.cpu() for view in augment(stored, params, **IDENTITY)], 1)  # [B, Vg, 3, S, S]
    for (b, v), row in np.ndenumerate(params):
        box = row["crop_box"].tolist()
        exact = v2.resized_crop(torch.from_numpy(images[ids[b]]).permute(2, 0, 1).double(), *box, [size_px] * 2)
        assert (levels[b, v] - exact).abs().max() <= 0.501
    for name, value in (jitter(CONTRAST, 0.7) | {"flip": True}).items():
        params[name] = value
    cut = levels.round().to(torch.uint8).permute(0, 1, 3, 4, 2).to(device)
    for ours, expected in zip(augment(stored, params, **IDENTITY), augment(cut, params, **IDENTITY), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=EXACT_LEVELS / 255)
