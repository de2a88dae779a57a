import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fastssl.cli import main
from kernels.augment.ops.jitter import CONTRAST, HUE
from kernels.augment.params import VIEW_PARAMS
from pipelines.philox import uniform
from pipelines.views import (
    RECIPES,
    EvalViewSpec,
    ViewsConfig,
    ViewSpec,
    build_eval_spec,
    build_view_specs,
    draw,
    eval_params,
    size_groups,
)
from tests.helpers.shards import write_pictures

NUM_DRAWS = 20_000
# A spec in which every op can happen.
EVERYTHING = ViewSpec(affine_p=0.5, affine_degrees=30.0, blur_p=0.5, solarize_p=0.3)


def _draw_one(spec: ViewSpec, num: int = NUM_DRAWS, height_px: int = 120, width_px: int = 160) -> np.ndarray:
    return draw((spec,), 0, 0, np.arange(num), np.tile([height_px, width_px], (num, 1)))[:, 0]


# --- what the draw depends on


def test_golden_values() -> None:
    """Stored numbers: they move only if the counter's layout or an op's arithmetic changes, and so every run."""
    sizes = np.array([[32, 32], [300, 400], [500, 100]])
    params = draw(RECIPES["byol"], 7, 3, np.array([0, 1, 2**33 + 5]), sizes)
    assert params["crop_box"].tolist() == [
        [[0, 5, 28, 23], [1, 7, 19, 25]],
        [[1, 68, 276, 270], [1, 8, 291, 380]],
        [[183, 0, 133, 100], [183, 0, 133, 100]],
    ]
    assert params["flip"].tolist() == [[True, True], [True, False], [False, False]]
    assert params["jitter"].tolist() == [[True, True], [True, True], [False, True]]
    assert params["jitter_order"][0].tolist() == [[0, 2, 1, 3], [3, 0, 1, 2]]
    expected = [[0.71270818, 0.78418380, 0.93400538, 0.02631031], [0.97292781, 0.63672864, 0.87459862, 0.01897446]]
    np.testing.assert_allclose(params["jitter_factor"][0], expected, rtol=1e-6)
    assert params["grayscale"].tolist() == [[False, False], [True, False], [False, True]]
    np.testing.assert_allclose(
        params["blur_sigma"], [[0.24682565, 0.87680876], [0.24471550, 0], [0.50771242, 0]], rtol=1e-6
    )
    digits = draw(RECIPES["digits"], 7, 3, np.array([5]), np.array([[8, 8]]))
    expected = [0.82306647, 0.17869014, 1.15321887, -0.05087439, 0.87748909, 4.39157581]
    np.testing.assert_allclose(digits["affine_matrix"][0, 0], expected, rtol=1e-5)


def test_a_sample_does_not_see_batch_order_or_rank() -> None:
    rng = np.random.default_rng(0)
    ids, sizes = rng.permutation(1000)[:64], rng.integers(20, 200, (64, 2))
    whole = draw((EVERYTHING, EVERYTHING), 1, 2, ids, sizes)
    shuffled = rng.permutation(64)
    np.testing.assert_array_equal(draw((EVERYTHING,) * 2, 1, 2, ids[shuffled], sizes[shuffled]), whole[shuffled])
    for world_size in (2, 4):
        parts = [
            draw((EVERYTHING,) * 2, 1, 2, ids[rank::world_size], sizes[rank::world_size]) for rank in range(world_size)
        ]
        for rank, part in enumerate(parts):
            np.testing.assert_array_equal(part, whole[rank::world_size])
    for row in range(8):
        np.testing.assert_array_equal(
            draw((EVERYTHING,) * 2, 1, 2, ids[row : row + 1], sizes[row : row + 1])[0], whole[row]
        )


def test_views_epochs_and_seeds_differ() -> None:
    ids, sizes = np.arange(200), np.full((200, 2), 100)
    base = draw((EVERYTHING, EVERYTHING), 0, 0, ids, sizes)
    assert np.mean(base[:, 0] == base[:, 1]) < 0.05
    assert np.mean(draw((EVERYTHING,), 0, 1, ids, sizes)[:, 0] == base[:, 0]) < 0.05
    assert np.mean(draw((EVERYTHING,), 1, 0, ids, sizes)[:, 0] == base[:, 0]) < 0.05


def test_switching_an_op_off_leaves_the_others() -> None:
    with_all = _draw_one(EVERYTHING, 500)
    without = _draw_one(replace(EVERYTHING, flip_p=0.0, jitter_p=0.0), 500)
    for name in ("crop_box", "affine_matrix", "grayscale", "blur_sigma", "solarize"):
        np.testing.assert_array_equal(without[name], with_all[name])
    assert not without["flip"].any()


def test_fields_of_an_op_that_is_off_are_zero() -> None:
    params = _draw_one(EVERYTHING, 2000)
    for gate, names in {
        "affine": ["affine_matrix"],
        "jitter": ["jitter_factor", "jitter_order"],
        "blur_sigma": ["blur_kernel_px"],
        "solarize": ["solarize_threshold"],
    }.items():
        off = params[gate] == 0
        assert 0 < off.sum() < 2000
        assert all(not params[name][off].any() for name in names)


# --- distributions; tolerances are 4 standard errors or more at NUM_DRAWS draws


def test_gate_rates() -> None:
    spec = ViewSpec(flip_p=0.5, jitter_p=0.8, grayscale_p=0.2, blur_p=0.1, solarize_p=0.2, affine_p=0.3)
    params = _draw_one(spec)
    rates = {"flip": 0.5, "jitter": 0.8, "grayscale": 0.2, "solarize": 0.2, "affine": 0.3}
    for name, rate in rates.items():
        assert abs(params[name].mean() - rate) < 0.015
    assert abs((params["blur_sigma"] > 0).mean() - 0.1) < 0.01


def test_probabilities_zero_and_one_are_exact() -> None:
    params = _draw_one(ViewSpec(flip_p=1.0, grayscale_p=0.0, jitter_p=1.0))
    assert params["flip"].all()
    assert params["jitter"].all()
    assert not params["grayscale"].any()


def test_jitter_ranges_and_means() -> None:
    params = _draw_one(ViewSpec(jitter_p=1.0, brightness=0.4, contrast=1.5, saturation=0.2, hue=0.1))
    factor = params["jitter_factor"].astype(np.float64)
    for op, (low, high) in enumerate([(0.6, 1.4), (0.0, 2.5), (0.8, 1.2), (-0.1, 0.1)]):
        values = factor[:, op]
        assert low <= values.min() < low + 0.001 * (high - low)
        assert high - 0.001 * (high - low) < values.max() <= high
        assert abs(values.mean() - (low + high) / 2) < 0.01 * (high - low)


def test_strength_zero_is_exactly_neutral() -> None:
    factor = _draw_one(ViewSpec(jitter_p=1.0, contrast=0.0, hue=0.0))["jitter_factor"]
    assert np.all(factor[:, CONTRAST] == 1)
    assert np.all(factor[:, HUE] == 0)


def test_jitter_order_is_uniform_over_the_24_permutations() -> None:
    """Chi-square with 23 degrees of freedom; its 99.9% point is 49.7."""
    orders = _draw_one(ViewSpec(jitter_p=1.0))["jitter_order"]
    assert np.all(np.sort(orders, axis=1) == [0, 1, 2, 3])
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 24
    assert np.sum((counts - NUM_DRAWS / 24) ** 2 / (NUM_DRAWS / 24)) < 49.7


def test_blur_sigma_range() -> None:
    sigma = _draw_one(ViewSpec(blur_p=1.0, blur_sigma=(0.1, 2.0)))["blur_sigma"]
    assert 0.1 <= sigma.min() < 0.105
    assert 1.995 < sigma.max() <= 2.0


def test_crop_area_and_ratio() -> None:
    """On a large square image almost every try fits where the area is small, so area and ratio are as drawn."""
    box = _draw_one(ViewSpec(crop_scale=(0.1, 0.5)), height_px=1000, width_px=1000)["crop_box"].astype(np.float64)
    area = box[:, 2] * box[:, 3] / 1e6
    log_ratio = np.log(box[:, 3] / box[:, 2])
    assert 0.099 < area.min() < 0.102
    assert 0.498 < area.max() < 0.502
    assert abs(area.mean() - 0.3) < 0.005
    assert abs(log_ratio.mean()) < 0.01
    assert abs(log_ratio).max() < math.log(4 / 3) + 0.01
    free = 1000 - box[:, 2:]
    assert np.all(box[:, :2] <= free)
    assert abs((box[:, :2] / free).mean() - 0.5) < 0.01


# --- the crop, against torchvision's algorithm written as a plain loop


def _scalar_crop(spec: ViewSpec, height: int, width: int, numbers: Iterator[float]) -> list[int]:
    """torchvision.transforms.v2.RandomResizedCrop.make_params with its random numbers given."""
    low, high = spec.crop_ratio
    for _ in range(10):
        area = height * width * (spec.crop_scale[0] + next(numbers) * (spec.crop_scale[1] - spec.crop_scale[0]))
        ratio = math.exp(math.log(low) + next(numbers) * (math.log(high) - math.log(low)))
        u_top, u_left = next(numbers), next(numbers)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return [int(u_top * (height - h + 1)), int(u_left * (width - w + 1)), h, w]
    if width / height < low:
        w, h = width, round(width / low)
    elif width / height > high:
        w, h = round(height * high), height
    else:
        w, h = width, height
    return [(height - h) // 2, (width - w) // 2, h, w]


@pytest.mark.parametrize("spec", [ViewSpec(), ViewSpec(crop_scale=(0.08, 1.0)), ViewSpec(crop_scale=(0.9, 1.0))])
def test_crop_equals_the_scalar_algorithm(spec: ViewSpec) -> None:
    rng = np.random.default_rng(1)
    sizes = rng.integers(4, 60, (3000, 2))
    ids = rng.integers(0, 2**40, 3000)
    boxes = draw((spec,), 11, 5, ids, sizes)["crop_box"][:, 0]
    numbers = uniform(11, 5, ids, 0, 0, num=40)
    expected = [
        _scalar_crop(spec, int(h), int(w), iter(row.tolist())) for (h, w), row in zip(sizes, numbers, strict=True)
    ]
    np.testing.assert_array_equal(boxes, expected)


@pytest.mark.parametrize(
    ("height_px", "width_px", "expected"),
    [(1000, 10, [493, 0, 13, 10]), (10, 1000, [0, 493, 10, 13])],
)
def test_fall_back_for_extreme_aspect_ratios(height_px: int, width_px: int, expected: list[int]) -> None:
    """No try fits: at scale .2 the crop would have to be 45 px wide or more."""
    boxes = _draw_one(ViewSpec(), 100, height_px, width_px)["crop_box"]
    assert np.all(boxes == expected)


def test_fall_back_takes_the_whole_image_when_its_ratio_is_in_range() -> None:
    boxes = _draw_one(ViewSpec(crop_scale=(1.0, 1.0), crop_ratio=(0.75, 0.76)), 100, 100, 100)["crop_box"]
    assert boxes[:, 2].tolist() == [100] * 100


def test_crop_of_a_single_pixel() -> None:
    for size in ((1, 1), (1, 300), (300, 1)):
        boxes = _draw_one(ViewSpec(), 50, *size)["crop_box"]
        assert boxes[:, 2:].min() >= 1
        assert np.all(boxes[:, :2] + boxes[:, 2:] <= size)


def test_crop_off_is_the_whole_image() -> None:
    assert np.all(_draw_one(ViewSpec(crop=False), 5)["crop_box"] == [0, 0, 120, 160])


def test_affine_matrix_equals_torchvisions() -> None:
    from torchvision.transforms.v2.functional._geometry import _get_inverse_affine_matrix

    spec = replace(RECIPES["digits"][0], size_px=32)
    matrices = _draw_one(spec, 200)["affine_matrix"]
    numbers = uniform(0, 0, np.arange(200), 0, 1, num=7) * 2 - 1  # in [-1, 1)
    for matrix, (_, angle, shift_x, shift_y, _, shear_x, shear_y), scale in zip(
        matrices, numbers, 0.8 + uniform(0, 0, np.arange(200), 0, 1, num=5)[:, 4] * 0.45, strict=True
    ):
        shift = [round(shift_x * 3.2), round(shift_y * 3.2)]
        expected = _get_inverse_affine_matrix([15.5, 15.5], angle * 20, shift, scale, [shear_x * 14, shear_y * 14])
        np.testing.assert_allclose(matrix, expected, atol=1e-5)


# --- specs, recipes, config


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size_px", 0),
        ("size_px", 32.0),
        ("crop", 1),
        ("crop_scale", (0.5, 0.2)),
        ("crop_scale", (0.0, 1.0)),
        ("crop_scale", (0.2, 1.1)),
        ("crop_ratio", (0.75,)),
        ("flip_p", 1.5),
        ("jitter_p", "0.8"),
        ("brightness", -0.1),
        ("hue", 0.6),
        ("hue", float("nan")),
        ("blur_kernel_px", 22),
        ("blur_sigma", (0.0, 2.0)),
        ("solarize_threshold", 1.5),
        ("affine_shear_degrees", 90.0),
    ],
)
def test_bad_field_is_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        ViewSpec(**{field: value})


def test_override_reaches_every_view_and_lists_become_tuples() -> None:
    cfg = ViewsConfig(recipe="byol", size_px=96, override={"crop_scale": [0.3, 1], "blur_p": 0.0})
    specs = build_view_specs(cfg)
    assert [spec.size_px for spec in specs] == [96, 96]
    assert all(spec.crop_scale == (0.3, 1) and spec.blur_p == 0 for spec in specs)
    assert [spec.solarize_p for spec in specs] == [0.0, 0.2]
    assert build_eval_spec(cfg) == EvalViewSpec(size_px=96)


def test_bad_config() -> None:
    with pytest.raises(ValueError, match=r"blurp.*known: .*blur_p"):
        ViewsConfig(override={"blurp": 1.0})
    with pytest.raises(ValueError, match=r"simclr.*got 'simclear'"):
        ViewsConfig(recipe="simclear")
    with pytest.raises(ValueError, match="flip_p"):
        ViewsConfig(override={"flip_p": 2})
    with pytest.raises(ValueError, match="crop_fraction"):
        ViewsConfig(eval_crop_fraction=0.0)
    with pytest.raises(ValueError, match="std"):
        ViewsConfig(std=(1.0, 0.0, 1.0))


def test_size_groups_keep_the_order_of_first_appearance() -> None:
    specs = [ViewSpec(size_px=size) for size in (96, 32, 96, 32, 8)]
    assert size_groups(specs) == [(96, [0, 2]), (32, [1, 3]), (8, [4])]


def test_draw_rejects_sizes_of_another_length() -> None:
    with pytest.raises(ValueError, match="sizes"):
        draw((ViewSpec(),), 0, 0, np.arange(3), np.ones((2, 2)))


def test_eval_params() -> None:
    params = eval_params(EvalViewSpec(size_px=224, crop_fraction=0.875), np.array([[256, 256], [300, 401], [32, 1]]))
    assert params.shape == (3, 1)
    assert params.dtype == VIEW_PARAMS
    assert params["crop_box"][:, 0].tolist() == [[16, 16, 224, 224], [19, 69, 262, 262], [15, 0, 1, 1]]
    for name in ("affine", "flip", "jitter", "grayscale", "blur_sigma", "solarize"):
        assert not params[name].any()


def test_eval_of_a_whole_square_image_is_the_identity() -> None:
    assert eval_params(EvalViewSpec(), np.array([[32, 32]]))["crop_box"][0, 0].tolist() == [0, 0, 32, 32]


def test_the_picture_of_a_data_set_of_many_shards_is_next_to_its_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("pipelines.beton.writer.PAGE_BYTES", 4096)
    write_pictures(tmp_path / "set")
    assert main(["views", str(tmp_path / "set"), "--num", "4"]) == 0
    assert capsys.readouterr().out == f"views: {tmp_path}/set.views.png: 4 images, mio_small\n"
    assert (tmp_path / "set.views.png").exists()
