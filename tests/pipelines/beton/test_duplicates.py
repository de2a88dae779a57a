"""Copies and similar images are counted as by comparing every pair."""

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from pipelines.beton import duplicates
from pipelines.beton.duplicates import MAX_DISTANCE, count_duplicates, find_across
from pipelines.convert.hashes import hash_image
from pipelines.convert.images import store_file


def landscape(seed: int, height_px: int = 300, width_px: int = 400) -> Image.Image:
    """A picture with the spectrum of a photograph: amplitudes fall with the frequency."""
    noise = np.fft.fft2(np.random.default_rng(seed).normal(size=(height_px, width_px)))
    frequency = np.hypot(np.fft.fftfreq(height_px)[:, None], np.fft.fftfreq(width_px)[None])
    levels = np.fft.ifft2(noise / np.maximum(frequency, 1 / height_px) ** 1.5).real
    levels = (levels - levels.min()) / np.ptp(levels) * 200
    return Image.fromarray(np.stack([levels, levels * 0.8, levels * 0.6], axis=2).astype(np.uint8))


def random_hashes(num: int, seed: int) -> np.ndarray:
    """Looks around a few centres, at distances of 0 to 12; some have none; some contents occur twice or are unknown."""
    rng = np.random.default_rng(seed)
    looks = rng.integers(1, 1 << 63, max(num // 8, 1)).astype(np.uint64)[rng.integers(0, max(num // 8, 1), num)]
    for i in range(num):
        for bit in rng.choice(63, rng.integers(0, 7), replace=False):
            looks[i] ^= np.uint64(1) << np.uint64(bit)
    looks[rng.random(num) < 0.05] = 0
    return np.stack([rng.integers(0, num, num).astype(np.uint64), looks], axis=1)


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    bits = np.unpackbits((a[:, 1][:, None] ^ b[:, 1][None]).view(np.uint8).reshape(len(a), len(b), 8), axis=2).sum(2)
    has_look = (a[:, 1] != 0)[:, None] & (b[:, 1] != 0)[None]
    return np.where(has_look, bits, 99)


@pytest.mark.parametrize("all_pairs", [True, False])
def test_counts_are_those_of_all_pairs(all_pairs, monkeypatch):
    monkeypatch.setattr(duplicates, "MAX_ALL_PAIRS", 4096 if all_pairs else 0)
    a, b = np.split(random_hashes(1000, 0), [700])
    is_copy = (a[:, 0][:, None] == b[:, 0][None]).any(0) & (b[:, 0] != 0)
    is_near = (distances(a, b) <= MAX_DISTANCE).any(0)
    found = find_across(b, a)
    np.testing.assert_array_equal(found[0], is_copy)
    np.testing.assert_array_equal(found[1], is_near & ~is_copy)
    assert 0 < (is_near & ~is_copy).sum() < 300

    earlier = np.tri(700, k=-1, dtype=bool)
    is_copy = ((a[:, 0][:, None] == a[:, 0][None]) & earlier).any(1) & (a[:, 0] != 0)
    is_near = ((distances(a, a) <= MAX_DISTANCE) & earlier).any(1)
    assert count_duplicates(a) == {"copies": is_copy.sum(), "similar": (is_near & ~is_copy).sum()}
    monkeypatch.setattr(duplicates, "MAX_SIMILAR_IMAGES", 699)
    assert count_duplicates(a) == {"copies": is_copy.sum(), "similar": None}


def test_looks_of_one_image_in_other_forms_are_near_and_of_others_are_not(tmp_path):
    original = landscape(1)
    others = {
        "small": original.resize((200, 150)),
        "bright": ImageEnhance.Brightness(original).enhance(1.2),
        "cut": original.crop((2, 2, 398, 298)),
        "grey": original.convert("L"),
    }
    original.save(tmp_path / "a.jpg", quality=95)
    forms = [store_file(str(tmp_path / "a.jpg"), max_px=None, quality=95).hashes]
    for name, image in others.items():
        image.save(tmp_path / f"{name}.png")
        forms.append(store_file(str(tmp_path / f"{name}.png"), max_px=None, quality=95).hashes)
    original.save(tmp_path / "worse.jpg", quality=30)
    forms.append(store_file(str(tmp_path / "worse.jpg"), max_px=100, quality=95).hashes)
    different = [hash_image(b"x", np.asarray(landscape(seed))) for seed in range(2, 60)]
    forms, different = np.array(forms, np.uint64), np.array(different, np.uint64)
    assert find_across(forms[1:], forms[:1])[1].all()
    assert not find_across(different, forms)[1].any()
    assert len(np.unique(forms[:, 0])) == len(forms)


def test_what_has_no_look():
    for pixels in (np.full((50, 50, 3), 90, np.uint8), np.zeros((1, 1, 3), np.uint8), np.eye(8, 8, dtype=np.uint8)):
        rgb = np.ascontiguousarray(np.broadcast_to(pixels.reshape(*pixels.shape[:2], -1), (*pixels.shape[:2], 3)))
        found = hash_image(rgb, rgb)
        assert found.look == 0
        assert found.content != 0


def test_content_of_long_data():
    data = np.random.default_rng(0).bytes(100_000)
    small = np.asarray(Image.new("RGB", (20, 20)))
    assert hash_image(data, small).content == hash_image(bytes(data), small).content
    for other in (data[:-1], data + b"x", data[:50] + b"?" + data[51:], data[:-50] + b"?" + data[-49:]):
        assert hash_image(other, small).content != hash_image(data, small).content
    pixels = np.frombuffer(data[:99_999], np.uint8).reshape(-1, 3, 3).copy()
    before = hash_image(pixels, pixels).content
    pixels[3000, 1, 1] ^= 1
    assert hash_image(pixels, pixels).content != before
