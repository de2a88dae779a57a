import io
import itertools
import os
import subprocess
import sys
import tarfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as v2

from kernels.augment import augment, cpu
from kernels.augment.cpu import OutputPool
from kernels.augment.loops.blur_float32 import blur_weights
from kernels.augment.loops.blur_int16 import MAX_INT16_RADIUS, blend_weights
from kernels.augment.ops.jitter import BRIGHTNESS, CONTRAST, HUE, SATURATION
from kernels.augment.params import VIEW_PARAMS
from pipelines.views import RECIPES, ViewSpec, draw
from tests.helpers.processes import ROOT
from tests.helpers.view_records import jitter, make_records

IDENTITY: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
IMAGENET: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
# numba against the reference, in levels of 255; behind each what is seen on the images of this file.
EXACT_LEVELS = 0.0  # flip, brightness, grayscale, solarize: the same operations on the same floats
ROUNDING_LEVELS = 6e-5  # contrast, saturation: 3e-5, two units in the last place
HUE_LEVELS = 5e-4  # 4e-4: six sectors of rounding; our form does not divide by max - min, torchvision's does
# Of the float32 form, 9e-4: the weights left out move a value by less than 4e-6 * 255 = 1.0e-3.
BLUR_LEVELS = 1.2e-3
INT16_LEVELS = 0.05  # the integer form against the float32 form: 0.016; the sum of its roundings is at most 0.048
AFFINE_LEVELS = 0.0127  # 0.011 at 224 px, 1.5e-3 at 33: positions are float32, rounded at 1e-6 of the side
ALL_LEVELS = 1.2e-3  # recipes without affine: 6e-4
DIGITS_LEVELS = 5e-3  # the recipe with affine, at 32 px: 2.1e-3
NORMALISE_TOLERANCE = 5e-7  # of a normalised value, which is below 3: 2.4e-7
# The same in [0, 1] units, for single ops against torchvision itself
TOLERANCE = BLUR_LEVELS / 255
AFFINE_TOLERANCE = AFFINE_LEVELS / 255


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread() -> Iterator[None]:
    """The reference is many small ops: their threads would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _images(num: int, height_px: int = 32, width_px: int = 32, num_views: int = 1, seed: int = 0) -> np.ndarray:
    """Noise, flat colours, greys, black and white: uint8 [num, num_views, H, W, 3]."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (num, num_views, height_px, width_px, 3), dtype=np.uint8)
    images[0::6] = rng.integers(0, 256, (3,))
    images[1::6] = images[1::6, ..., :1]
    images[2::6] = images[2::6] // 128 * 255
    return images


@pytest.fixture
def float_blur(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU without AVX2."""
    monkeypatch.setattr(cpu, "BLUR_DTYPE", "float32")


def _max_difference(images: np.ndarray, params: np.ndarray, **options: Any) -> float:
    ours = augment(images, params, impl="numba", num_threads=1, **(IDENTITY | options))
    reference = augment(images, params, impl="reference", **(IDENTITY | options))
    return max(float((a - b).abs().max()) for a, b in zip(ours, reference, strict=True))


# --- the reference is torchvision v2, op by op

MATRIX_30_DEGREES = [0.8660254, 0.5, -5.673394, -0.5, 0.8660254, 9.826606]  # about the centre (15.5, 15.5)
OPS = {
    "flip": ({"flip": True}, v2.horizontal_flip),
    "brightness": (jitter(BRIGHTNESS, 1.3), lambda x: v2.adjust_brightness(x, 1.3)),
    "contrast": (jitter(CONTRAST, 0.7), lambda x: v2.adjust_contrast(x, 0.7)),
    "saturation": (jitter(SATURATION, 1.4), lambda x: v2.adjust_saturation(x, 1.4)),
    "hue": (jitter(HUE, -0.08), lambda x: v2.adjust_hue(x, -0.08)),
    "grayscale": ({"grayscale": True}, lambda x: v2.rgb_to_grayscale(x, 3)),
    "blur": ({"blur_sigma": 1.5, "blur_kernel_px": 23}, lambda x: v2.gaussian_blur(x, [23, 23], [1.5, 1.5])),
    "solarize": ({"solarize": True, "solarize_threshold": 0.3}, lambda x: v2.solarize(x, 0.3)),
    "affine": (
        {"affine": True, "affine_matrix": MATRIX_30_DEGREES},
        lambda x: v2.affine(x, 30.0, [0, 0], 1.0, [0.0, 0.0], interpolation=v2.InterpolationMode.BILINEAR),
    ),
}


@pytest.mark.usefixtures("float_blur")
@pytest.mark.parametrize("impl", ["reference", "numba"])
@pytest.mark.parametrize("name", OPS)
def test_each_op_is_torchvisions(name: str, impl: Any) -> None:
    fields, op = OPS[name]
    images = _images(12)
    expected = v2.normalize(
        op(torch.from_numpy(images[:, 0]).permute(0, 3, 1, 2) * np.float32(1 / 255)), IMAGENET["mean"], IMAGENET["std"]
    )
    (result,) = augment(images, make_records(12, **fields), impl=impl, **IMAGENET)
    tolerance = AFFINE_TOLERANCE if name == "affine" else TOLERANCE
    torch.testing.assert_close(result, expected, rtol=0, atol=tolerance / min(IMAGENET["std"]))


def test_affine_draws_equal_torchvisions() -> None:
    """Rotation, whole-pixel shift, scale and shear together: the drawn matrix against v2.affine's own arguments."""
    from pipelines.philox import uniform

    spec = RECIPES["digits"][0]
    images, ids = _images(20), np.arange(20)
    params = draw((spec,), 0, 0, ids, np.full((20, 2), 32))
    params["jitter"] = False
    numbers = uniform(0, 0, ids, 0, 1, num=7)
    results = augment(images, params, impl="reference", **IDENTITY)[0]
    for image, (_, *u), result in zip(images[:, 0], numbers.tolist(), results, strict=True):
        expected = v2.affine(
            torch.from_numpy(image).permute(2, 0, 1) * np.float32(1 / 255),
            angle=20 * (2 * u[0] - 1),
            translate=[round(3.2 * (2 * u[1] - 1)), round(3.2 * (2 * u[2] - 1))],
            scale=0.8 + 0.45 * u[3],
            shear=[14 * (2 * u[4] - 1), 14 * (2 * u[5] - 1)],
            interpolation=v2.InterpolationMode.BILINEAR,
        )
        torch.testing.assert_close(result, expected, rtol=0, atol=AFFINE_TOLERANCE)


@pytest.mark.parametrize("order", [(0, 3), (3, 0), (1, 2), (2, 1), (1, 3), (3, 1)])
def test_jitter_order_is_the_drawn_one(order: tuple[int, int]) -> None:
    """Strong factors: the clamps make the order visible."""
    adjust = {
        BRIGHTNESS: v2.adjust_brightness,
        CONTRAST: v2.adjust_contrast,
        SATURATION: v2.adjust_saturation,
        HUE: v2.adjust_hue,
    }
    factors = {BRIGHTNESS: 1.8, CONTRAST: 1.7, SATURATION: 2.0, HUE: 0.3}
    rest = [op for op in range(4) if op not in order]
    neutral = [factors[op] if op in order else float(op != HUE) for op in range(4)]
    images = _images(6)
    params = make_records(6, jitter=True, jitter_order=[*order, *rest], jitter_factor=neutral)
    image = torch.from_numpy(images[:, 0]).permute(0, 3, 1, 2) * np.float32(1 / 255)
    for op in order:
        image = adjust[op](image, factors[op])
    for impl in ("reference", "numba"):
        (result,) = augment(images, params, impl=impl, **IDENTITY)
        torch.testing.assert_close(result, image, rtol=0, atol=TOLERANCE)


# --- numba equals the reference

SIDES_PX = [1, 2, 31, 33, 96, 224]
BLURS = {"small": [(0.1, 23), (0.3, 23), (0.5, 23)], "large": [(1.0, 3), (1.0, 23), (2.0, 9), (2.0, 23), (5.0, 23)]}
PARITY: dict[str, tuple[float, list[dict[str, Any]]]] = {
    "flip": (EXACT_LEVELS, [{"flip": True}]),
    "brightness": (EXACT_LEVELS, [jitter(BRIGHTNESS, x) for x in (0.2, 0.6, 1.4, 2.0)]),
    "contrast": (ROUNDING_LEVELS, [jitter(CONTRAST, x) for x in (0.2, 0.6, 1.4, 2.0)]),
    "saturation": (ROUNDING_LEVELS, [jitter(SATURATION, x) for x in (0.0, 0.6, 1.4, 2.0)]),
    "hue": (HUE_LEVELS, [jitter(HUE, x) for x in (-0.5, -0.1, 0.03, 0.3)]),
    "grayscale": (EXACT_LEVELS, [{"grayscale": True}]),
    "blur_small": (BLUR_LEVELS, [{"blur_sigma": s, "blur_kernel_px": k} for s, k in BLURS["small"]]),
    "blur_large": (BLUR_LEVELS, [{"blur_sigma": s, "blur_kernel_px": k} for s, k in BLURS["large"]]),
    # 128/255 is a level: a pixel at the threshold
    "solarize": (EXACT_LEVELS, [{"solarize": True, "solarize_threshold": x} for x in (0, 0.3, 128 / 255, 0.5, 1)]),
    "affine": (AFFINE_LEVELS, [{"affine": True, "flip": False}, {"affine": True, "flip": True}]),
}


def _made(side_px: int) -> np.ndarray:
    """Noise, gradients, saturated colours, greys, one colour: uint8 [6, 1, side, side, 3]."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 255, side_px).round().astype(np.uint8)
    images = np.empty((6, 1, side_px, side_px, 3), np.uint8)
    images[0] = rng.integers(0, 256, (side_px, side_px, 3))
    images[1] = ramp[:, None, None]
    images[2] = np.stack(np.broadcast_arrays(ramp[:, None], ramp, ramp[::-1]), -1)
    images[3] = rng.integers(0, 2, (side_px, side_px, 3)) * 255
    images[4] = rng.integers(0, 256, (side_px, side_px, 1))
    images[5] = (200, 31, 90)
    return images


@pytest.fixture(scope="module")
def photographs() -> list[Image.Image]:
    folder = os.environ.get("FASTSSL_TEST_DATA")
    archive = Path(folder or "") / "imagenet-sample-500.tar"
    if not folder or not archive.is_file():
        pytest.skip("set FASTSSL_TEST_DATA to the folder of imagenet-sample-500.tar")
    with tarfile.open(archive) as tar:
        files = [tar.extractfile(member) for member in tar if member.name.lower().endswith((".jpg", ".jpeg"))]
        return [Image.open(io.BytesIO(file.read())).convert("RGB") for file in files[::50] if file]


def _resized(photographs: list[Image.Image], side_px: int, num_views: int = 1) -> np.ndarray:
    pixels = np.stack([np.asarray(photograph.resize((side_px, side_px))) for photograph in photographs])
    return np.repeat(pixels[:, None], num_views, 1)


def _rotation(side_px: int) -> np.ndarray:
    """30 degrees about the centre, and a tenth larger; float32 [6]."""
    turn = np.array([[0.8660254, 0.5], [-0.5, 0.8660254]]) / 1.1
    centre = np.full(2, (side_px - 1) / 2)
    return np.column_stack((turn, centre - turn @ centre)).reshape(-1).astype(np.float32)


def _assert_parity(name: str, images: np.ndarray) -> None:
    limit, variants = PARITY[name]
    for fields in variants:
        params = make_records(len(images), **fields)
        params["affine_matrix"] = _rotation(images.shape[2]) * params["affine"][..., None]
        assert 255 * _max_difference(images, params) <= limit, fields


@pytest.mark.usefixtures("float_blur")
@pytest.mark.parametrize("side_px", SIDES_PX)
@pytest.mark.parametrize("name", PARITY)
def test_each_op_on_every_side(name: str, side_px: int) -> None:
    """Sides below 12 px cut the blur's 23 taps."""
    _assert_parity(name, _made(side_px))


@pytest.mark.usefixtures("float_blur")
@pytest.mark.parametrize("name", PARITY)
def test_each_op_on_photographs(name: str, photographs: list[Image.Image]) -> None:
    _assert_parity(name, _resized(photographs, 96))


@pytest.mark.parametrize("side_px", SIDES_PX)
@pytest.mark.parametrize("flip", [False, True])
def test_normalise(flip: bool, side_px: int) -> None:
    images = _made(side_px)
    assert _max_difference(images, make_records(len(images), flip=flip), **IMAGENET) <= NORMALISE_TOLERANCE


@pytest.mark.usefixtures("float_blur")
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_at_32_px(recipe: str) -> None:
    num = 300
    params = draw(RECIPES[recipe][:2], 3, 0, np.arange(num), np.full((num, 2), 32))
    limit = DIGITS_LEVELS if recipe == "digits" else ALL_LEVELS
    assert 255 * _max_difference(_images(num, num_views=2), params) <= limit


@pytest.mark.usefixtures("float_blur")
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_on_photographs(recipe: str, photographs: list[Image.Image]) -> None:
    side_px = RECIPES[recipe][0].size_px
    images = _resized(photographs, side_px, num_views=2)
    params = draw(RECIPES[recipe][:2], 3, 0, np.arange(len(images)), np.full((len(images), 2), side_px))
    assert 255 * _max_difference(images, params) <= (DIGITS_LEVELS if recipe == "digits" else ALL_LEVELS)


@pytest.mark.usefixtures("float_blur")
@pytest.mark.parametrize("size_px", [(3, 1500), (14, 1024), (14, 700)])
def test_rows_wider_than_a_piece(size_px: tuple[int, int]) -> None:
    """The op works on pieces of about a thousand pixels: here a part of a row, or one row."""
    spec = ViewSpec(jitter_p=0.8, blur_p=0.5, solarize_p=0.5)
    params = draw((spec,), 1, 0, np.arange(12), np.full((12, 2), 32))
    images = _images(12, *size_px)
    assert 255 * _max_difference(images, params) <= ALL_LEVELS
    shifted = np.zeros_like(images)
    shifted[:, :, 1:, :-3] = images[:, :, :-1, 3:]
    for flip in (False, True):
        records = make_records(12, affine=True, affine_matrix=[1, 0, 3, 0, 1, -1], flip=flip)
        (result,) = augment(images, records, **IDENTITY)
        expected = torch.from_numpy(shifted[:, 0]).permute(0, 3, 1, 2) / 255
        torch.testing.assert_close(result, expected.flip(-1) if flip else expected, rtol=0, atol=ROUNDING_LEVELS / 255)


def test_a_pixel_at_the_solarize_threshold_is_inverted() -> None:
    levels = np.repeat(np.array([127, 128, 129], np.uint8), 3).reshape(1, 1, 1, 3, 3)
    params = make_records(solarize=True, solarize_threshold=np.float32(128) * np.float32(1 / 255))
    (result,) = augment(levels, params, **IDENTITY)
    expected = torch.tensor([127, 127, 126]) / 255
    torch.testing.assert_close(result[0, 0, 0], expected, rtol=0, atol=ROUNDING_LEVELS / 255)


@pytest.mark.usefixtures("float_blur")
@pytest.mark.parametrize("size_px", [(8, 8), (33, 47), (96, 64), (224, 224)])
def test_everything_at_once_at_other_sizes(size_px: tuple[int, int]) -> None:
    """No solarize above another threshold than .5: it jumps there, and a rounding error would be a jump too."""
    spec = ViewSpec(affine_p=0.5, affine_degrees=40.0, affine_shear_degrees=10.0, blur_p=0.5, solarize_p=0.5)
    params = draw((spec,), 5, 0, np.arange(24), np.full((24, 2), 32))
    assert _max_difference(_images(24, *size_px), params) < AFFINE_TOLERANCE


@pytest.mark.parametrize("hue", [-0.5, -0.25, -0.1, 0.1, 1 / 3, 0.5])
def test_hue_of_every_kind_of_pixel(hue: float) -> None:
    """All 16^3 colours of a coarse grid (greys, black, white, ties of two channels) and their neighbours."""
    levels = np.array([0, 1, 2, 15, 16, 64, 65, 100, 127, 128, 129, 180, 200, 253, 254, 255], np.uint8)
    colours = np.array(list(itertools.product(levels, repeat=3)), np.uint8).reshape(1, 1, 64, 64, 3)
    assert _max_difference(colours, make_records(**jitter(HUE, hue))) < 2e-6


def test_grey_pixels_keep_their_value_under_hue_and_saturation() -> None:
    greys = np.repeat(np.arange(256, dtype=np.uint8), 3).reshape(1, 1, 16, 16, 3)
    expected = torch.arange(256).reshape(16, 16) / 255
    for fields in (jitter(HUE, 0.2), jitter(SATURATION, 0.3)):
        (result,) = augment(greys, make_records(**fields), **IDENTITY)
        # torchvision's grey weights sum to .9999, so saturation moves a grey by up to 7e-5
        torch.testing.assert_close(result[0], expected.expand(3, 16, 16), rtol=0, atol=1e-4)


def test_results_stay_in_zero_to_one() -> None:
    spec = ViewSpec(jitter_p=1.0, brightness=1.0, contrast=1.0, saturation=1.0, hue=0.5, solarize_p=0.5)
    params = draw((spec,), 0, 0, np.arange(100), np.full((100, 2), 32))
    (result,) = augment(_images(100), params, **IDENTITY)
    assert float(result.min()) >= -1e-6
    assert float(result.max()) <= 1 + 1e-6


@pytest.mark.usefixtures("float_blur")
@pytest.mark.parametrize("size_px", [(1, 1), (2, 5), (8, 8), (11, 11), (12, 12)])
def test_blur_kernel_larger_than_the_image_is_cut(size_px: tuple[int, int]) -> None:
    """23 taps need 12 px; below that the largest kernel that reflect padding can serve is used."""
    images = _images(6, *size_px)
    params = make_records(6, blur_sigma=2.0, blur_kernel_px=23)
    assert _max_difference(images, params) < TOLERANCE
    assert np.all(params["blur_kernel_px"] == 23)
    kernel_px = min(23, 2 * min(size_px) - 1)
    expected = v2.gaussian_blur(torch.from_numpy(images[:, 0]).permute(0, 3, 1, 2) / 255, [kernel_px] * 2, [2.0, 2.0])
    torch.testing.assert_close(augment(images, params, **IDENTITY)[0], expected, rtol=0, atol=TOLERANCE)


@pytest.mark.usefixtures("float_blur")
def test_blur_sigma_from_nothing_to_wide() -> None:
    sigmas = np.linspace(0.1, 5, 30, dtype=np.float32)[:, None]
    assert _max_difference(_images(30), make_records(30, blur_sigma=sigmas, blur_kernel_px=23)) < TOLERANCE


def test_flip_and_affine_do_not_commute_and_affine_is_first() -> None:
    images = _images(6)
    affine = {"affine": True, "affine_matrix": MATRIX_30_DEGREES}
    (both,) = augment(images, make_records(6, flip=True, **affine), **IDENTITY)
    (only_affine,) = augment(images, make_records(6, **affine), **IDENTITY)
    torch.testing.assert_close(both, only_affine.flip(-1), rtol=0, atol=0)
    (flipped_before,) = augment(np.ascontiguousarray(images[:, :, :, ::-1]), make_records(6, **affine), **IDENTITY)
    assert float((both - flipped_before).abs().max()) > 0.1


# --- the blur in 16-bit integers


def _blur(images: np.ndarray, params: np.ndarray, blur_dtype: Any, **options: Any) -> np.ndarray:
    """float32 [Vg, B, H, W, 3]."""
    return cpu.augment_numba(
        images, params, **(IDENTITY | options), num_threads=1, outputs=OutputPool(), blur_dtype=blur_dtype
    )


def _extremes(num: int, height_px: int, width_px: int) -> np.ndarray:
    """Noise, noise of 0 and 255, and checkerboards of 0 and 255 with squares of 1..7 px: uint8 [num, 1, H, W, 3]."""
    images = np.random.default_rng(1).integers(0, 256, (num, 1, height_px, width_px, 3), dtype=np.uint8)
    images[1::3] = images[1::3] // 128 * 255
    y, x = np.indices((height_px, width_px))
    for i, image in enumerate(images[2::3, 0]):
        image[:] = ((y // (1 + i % 7) + x // (1 + i % 5)) % 2 * 255)[..., None]
    return images


@pytest.mark.parametrize("kernel_px", [3, 9, 23])
@pytest.mark.parametrize(
    "size_px", [(32, 32), (96, 96), (224, 224), (1, 1), (2, 5), (33, 47), (11, 13), (3, 1500), (14, 1024)]
)
def test_integer_blur_is_the_float_blur(size_px: tuple[int, int], kernel_px: int) -> None:
    """The borders too: sides below 12 px are all reflection."""
    num = 24
    sigmas = np.linspace(0.1, 2, num, dtype=np.float32)[:, None]
    params = make_records(num, blur_sigma=sigmas, blur_kernel_px=kernel_px)
    images = _extremes(num, *size_px)
    difference = np.abs(_blur(images, params, "int16") - _blur(images, params, "float32"))
    assert 255 * difference.max() <= INT16_LEVELS
    if min(size_px) >= 32:  # it is another form
        assert difference.max() > 0


def test_integer_blur_within_its_bound_for_every_sigma() -> None:
    """The sum of all roundings: half a step of 1/128 level each, weighted, for the worst image."""
    weights, blends = np.empty(12, np.float32), np.empty(12, np.int16)
    for sigma in np.linspace(0.1, 2, 2001, dtype=np.float32):
        radius = blur_weights(sigma, 11, weights)
        assert radius <= MAX_INT16_RADIUS
        blend_weights(weights, radius, blends)
        beyond = np.append(2 * np.cumsum(weights[radius:0:-1], dtype=np.float64)[::-1], 0)  # at distance > i
        inside = np.append(1.0, beyond[:-1])
        shares = np.abs(32768 * beyond[:radius] / inside[:radius] - blends[:radius]) * 32640 / 32768
        axis = 0.5 * (1 - weights[0]) + np.sum(inside[:radius] * (0.5 + shares))  # means, products, weights
        assert (2 * axis + 0.5) / 128 <= INT16_LEVELS


def test_integer_blur_of_one_level_is_exact() -> None:
    """Equal to the bit to the view without a blur, whatever the level and sigma."""
    images = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(256, 1, 1, 1, 1), (256, 1, 33, 40, 3))
    for sigma in (0.2, 0.7, 1.3, 2.0):
        blurred = _blur(images, make_records(256, blur_sigma=sigma, blur_kernel_px=23), "int16")
        np.testing.assert_array_equal(blurred, _blur(images, make_records(256, flip=True), "int16"))


def test_integer_blur_changes_blurred_views_only() -> None:
    params = draw(RECIPES["byol"], 0, 0, np.arange(40), np.full((40, 2), 32))
    images = _images(40, num_views=2)
    forms = _blur(images, params, "int16"), _blur(images, params, "float32")
    is_blurred = params["blur_sigma"].T > 0
    assert 0 < is_blurred.sum() < is_blurred.size
    np.testing.assert_array_equal(forms[0][~is_blurred], forms[1][~is_blurred])
    assert not np.array_equal(forms[0][is_blurred], forms[1][is_blurred])


def test_wide_blurs_are_floats() -> None:
    images = _extremes(6, 32, 32)
    params = make_records(6, blur_sigma=np.nextafter(np.float32(2), np.float32(3)), blur_kernel_px=23)
    np.testing.assert_array_equal(_blur(images, params, "int16"), _blur(images, params, "float32"))


@pytest.mark.parametrize("recipe", ["byol", "simclr", "digits"])
def test_recipes_with_the_integer_blur(recipe: str) -> None:
    num = 60
    params = draw(RECIPES[recipe][:2], 3, 0, np.arange(num), np.full((num, 2), 32))
    images = _images(num, num_views=2)
    difference = np.abs(_blur(images, params, "int16") - _blur(images, params, "float32"))
    assert 255 * difference.max() <= INT16_LEVELS  # solarize at .5 does not jump


WITHOUT_AVX2 = """
import sys
import numpy as np
from kernels.augment import cpu
inputs = np.load(sys.argv[1])
for blur_dtype in (None, "float32", "int16"):
    result = cpu.augment_numba(
        inputs["images"], inputs["params"], (0,) * 3, (1,) * 3, 1, cpu.OutputPool(), blur_dtype=blur_dtype
    )
    np.save(f"{sys.argv[1]}.{blur_dtype}.npy", result)
print(cpu.BLUR_DTYPE)
"""


def test_without_avx2_the_blur_is_in_floats(tmp_path: Path) -> None:
    """numba compiles for another CPU. The integers, if asked for, are the same on every CPU."""
    images, params = _extremes(6, 33, 40), make_records(6, blur_sigma=1.7, blur_kernel_px=23)
    inputs = tmp_path / "inputs.npz"
    np.savez(inputs, images=images, params=params)
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_AVX2, str(inputs)],
        check=True,
        env=os.environ | {"NUMBA_CPU_NAME": "generic", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.stdout.split() == ["float32"]
    chosen, floats, integers = (np.load(f"{inputs}.{name}.npy") for name in (None, "float32", "int16"))
    np.testing.assert_array_equal(chosen, floats)
    np.testing.assert_array_equal(integers, _blur(images, params, "int16"))
    np.testing.assert_allclose(floats, _blur(images, params, "float32"), rtol=0, atol=TOLERANCE)


def test_avx2_decides() -> None:
    features = Path("/proc/cpuinfo").read_text().split()
    assert ("avx2" in features) == (cpu.BLUR_DTYPE == "int16")


# --- the interface


def test_a_large_result_bypasses_the_caches_with_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    params = draw(RECIPES["byol"], 0, 0, np.arange(20), np.full((20, 2), 96))
    params[:4] = np.zeros((), VIEW_PARAMS)  # views without ops have a loop of their own
    params["flip"][2:4] = True
    images = _images(20, 96, 96, num_views=2)
    plain = _blur(images, params, None, **IMAGENET)
    assert plain.nbytes < cpu._MIN_STREAMED_BYTES
    monkeypatch.setattr(cpu, "_MIN_STREAMED_BYTES", 0)
    np.testing.assert_array_equal(_blur(images, params, None, **IMAGENET), plain)


@pytest.mark.parametrize("impl", ["numba", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_output_layout_and_dtype(impl: Any, dtype: torch.dtype) -> None:
    images = _images(5, 16, 24, num_views=3)
    params = np.zeros((5, 3), VIEW_PARAMS)
    views = augment(images, params, dtype=dtype, impl=impl, **IMAGENET)
    exact = augment(images, params, impl="reference", **IMAGENET)
    assert len(views) == 3
    for view, expected in zip(views, exact, strict=True):
        assert view.shape == (5, 3, 16, 24)
        assert view.dtype == dtype
        assert view.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(view.float(), expected.to(dtype).float(), rtol=2**-8, atol=1e-6)


def test_number_of_threads_changes_nothing() -> None:
    """Large enough for several shares: smaller batches are left to one thread."""
    params = draw(RECIPES["byol"], 0, 0, np.arange(37), np.full((37, 2), 96))
    images = _images(37, 96, 96, num_views=2)
    one = augment(images, params, num_threads=1, **IMAGENET)
    for num_threads in (2, 3, 8):
        for view, expected in zip(augment(images, params, num_threads=num_threads, **IMAGENET), one, strict=True):
            assert torch.equal(view, expected)


def test_memory_of_a_result_is_used_again_only_when_nobody_holds_it() -> None:
    pool = OutputPool()
    first = pool.take((2, 3, 4))
    address = first.ctypes.data
    kept = torch.from_numpy(first)[1]  # a slice is enough
    del first
    second = pool.take((2, 3, 4))
    assert second.ctypes.data != address
    del kept
    assert pool.take((4, 3, 2)).ctypes.data == address


def test_memory_of_another_size_is_given_back() -> None:
    pool = OutputPool()
    memory = weakref.ref(pool.take((2, 3, 4)).base)
    assert memory() is not None
    larger = pool.take((5, 5))
    assert memory() is None
    assert larger.shape == (5, 5)


def test_a_sample_does_not_see_its_batch() -> None:
    params = draw(RECIPES["byol"], 0, 0, np.arange(9), np.full((9, 2), 32))
    images = _images(9, num_views=2)
    whole = augment(images, params, **IMAGENET)
    for row in range(9):
        for view, alone in enumerate(augment(images[row : row + 1], params[row : row + 1], **IMAGENET)):
            assert torch.equal(alone[0], whole[view][row])


def test_inputs_that_are_slices_work_and_are_not_changed() -> None:
    """A loader passes the views of one size: columns of the drawn parameters, not contiguous."""
    params = draw(RECIPES["simclr"] * 2, 0, 0, np.arange(8), np.full((8, 2), 32))
    images = _images(8, num_views=4)
    before = images.copy(), params.copy()
    views = augment(images[:, ::2], params[:, [0, 2]], **IMAGENET)
    whole = augment(images, params, **IMAGENET)
    assert torch.equal(views[1], whole[2])
    np.testing.assert_array_equal(images, before[0])
    np.testing.assert_array_equal(params, before[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"views": np.zeros((2, 1, 8, 8, 3), np.float32)}, "uint8"),
        ({"views": np.zeros((2, 1, 3, 8, 8), np.uint8)}, "uint8"),
        ({"params": np.zeros((2, 2), VIEW_PARAMS)}, "params"),
        ({"params": np.zeros((2, 1), np.float32)}, "params"),
        ({"std": (1.0, 0.0, 1.0)}, "std"),
        ({"mean": (0.5,)}, "mean"),
        ({"num_threads": 0}, "num_threads"),
        ({"impl": "cuda"}, "impl"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    arguments = {"views": np.zeros((2, 1, 8, 8, 3), np.uint8), "params": np.zeros((2, 1), VIEW_PARAMS)} | IDENTITY
    with pytest.raises(ValueError, match=message):
        augment(**(arguments | change))
