"""The numba resampler against torchvision's antialiased resize on float32, rounded once."""

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.engines.torch import resized_crop as reference_crop
from pipelines.resample import is_small, resized_crop, small_crop, small_weights, triangle_weights

# Both round a float32 sum to the nearest level; the order of the sums differs, so a tie may fall to either side.
MAX_DIFFERENCE_LEVELS = 1
MEAN_DIFFERENCE_LEVELS = 0.002

BOXES = [
    (0, 0, 375, 500),  # the whole image
    (3, 5, 371, 489),
    (17, 33, 224, 224),  # copied at 224
    (100, 200, 31, 47),  # upscaled at 224
    (374, 499, 1, 1),
    (0, 0, 375, 1),
    (200, 7, 1, 333),
]


def make_photograph(height_px: int = 375, width_px: int = 500) -> np.ndarray:
    """Smooth noise with fine noise on top, uint8 [H, W, 3]."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width_px, height_px), Image.Resampling.BICUBIC), np.float64)
    return np.clip(smooth + rng.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8)


def crop(image: np.ndarray, box: tuple[int, int, int, int], size_px: int) -> np.ndarray:
    out = np.empty((size_px, size_px, 3), np.uint8)
    resized_crop(image, *box, out)
    return out


@pytest.mark.parametrize("size_px", [1, 7, 32, 224, 500])
@pytest.mark.parametrize("box", BOXES)
def test_equals_torchvision_within_one_level(box, size_px):
    image = make_photograph()
    expected = reference_crop(torch.from_numpy(image).permute(2, 0, 1).float(), list(box), size_px)
    difference = np.abs(crop(image, box, size_px).astype(int) - expected)
    assert difference.max() <= MAX_DIFFERENCE_LEVELS
    assert difference.mean() <= max(MEAN_DIFFERENCE_LEVELS, 1 / difference.size)


@pytest.mark.parametrize("size_px", [8, 32])
def test_every_small_box_of_an_image_of_that_size(size_px):
    """Boxes at all its edges; with tables for every length, as the engine cuts them."""
    image = make_photograph(size_px, size_px)
    firsts, weights = small_weights(size_px)
    pixels, num_small = torch.from_numpy(image).permute(2, 0, 1).float(), 0
    for height_px, width_px in [(h, w) for h in range(1, size_px + 1) for w in (1, 2, 3, size_px // 2, size_px)]:
        for box in [(0, 0, height_px, width_px), (size_px - height_px, size_px - width_px, height_px, width_px)]:
            out = crop(image, box, size_px)
            assert np.abs(out.astype(int) - reference_crop(pixels, list(box), size_px)).max() <= MAX_DIFFERENCE_LEVELS
            if is_small(height_px, width_px, size_px):
                num_small += 1
                from_table = np.empty_like(out)
                tables = [(firsts[length], weights[length]) for length in (height_px, width_px)]
                small_crop(image, *box, *tables, from_table)
                np.testing.assert_array_equal(from_table, out)
    assert num_small > size_px


def test_close_to_pillow_which_rounds_between_its_passes():
    image = make_photograph()
    cropped = Image.fromarray(image[17:317, 33:333])
    expected = np.asarray(cropped.resize((224, 224), Image.Resampling.BILINEAR))
    difference = np.abs(crop(image, (17, 33, 300, 300), 224).astype(int) - expected)
    assert difference.max() <= 2
    assert difference.mean() <= 0.2


def test_a_crop_of_the_output_size_is_copied():
    image = make_photograph()
    np.testing.assert_array_equal(crop(image, (17, 33, 224, 224), 224), image[17:241, 33:257])


def test_the_ends_of_the_range_stay_there():
    for level in (0, 255):
        image = np.full((61, 47, 3), level, np.uint8)
        assert (crop(image, (2, 3, 50, 40), 33) == level).all()


@pytest.mark.parametrize(("in_px", "out_px"), [(1, 1), (1, 32), (3, 2), (500, 224), (224, 500), (333, 332), (4000, 32)])
def test_weights_sum_to_one_and_stay_inside(in_px, out_px):
    first, weights = triangle_weights(in_px, out_px)
    assert first.min() >= 0
    positions = first[:, None] + np.arange(weights.shape[1])
    assert (weights[positions >= in_px] == 0).all()
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)


@pytest.mark.parametrize(("in_px", "out_px"), [(1, 32), (3, 2), (500, 224), (224, 500), (333, 332), (4000, 32)])
def test_weights_are_the_triangle_of_the_definition(in_px, out_px):
    first, weights = triangle_weights(in_px, out_px)
    scale = in_px / out_px
    distance = np.abs(np.arange(in_px) + 0.5 - scale * (np.arange(out_px)[:, None] + 0.5))
    expected = np.maximum(1 - distance / max(scale, 1), 0)
    expected /= expected.sum(1, keepdims=True)
    dense = np.zeros((out_px, in_px + weights.shape[1]))
    np.put_along_axis(dense, first[:, None] + np.arange(weights.shape[1]), weights, 1)
    np.testing.assert_allclose(dense[:, :in_px], expected, atol=1e-6)


def test_same_size_needs_one_pixel_each():
    first, weights = triangle_weights(8, 8)
    positions = first[:, None] + np.arange(2)
    np.testing.assert_array_equal(weights, positions == np.arange(8)[:, None])
