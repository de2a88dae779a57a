import numpy as np
import pytest

from pipelines.philox import philox4x32, random_words, uniform

# Random123 1.14, tests/kat_vectors, "philox4x32 10": counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def _words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(counter: str, key: str, expected: str) -> None:
    key_0, key_1 = _words(key)
    result = philox4x32([np.array([word], np.uint64) for word in _words(counter)], (key_0, key_1))
    assert [int(word[0]) for word in result] == _words(expected)


def test_counter_layout_is_the_documented_one() -> None:
    """The third known answer through the address: c0, c1 = id; c2 = epoch; c3 = view, op, block; key = seed."""
    words = random_words(
        seed=0x299F31D0A4093822,
        epoch=0x13198A2E,
        sample_ids=np.array([0x85A308D3243F6A88], np.uint64),
        view=0x0370,
        op=0x73,
        num_blocks=1,
        first_block=0x44,
    )
    assert words[0].tolist() == _words(KNOWN_ANSWERS[2][2])


def test_uniform_is_word_over_two_to_32() -> None:
    ids = np.arange(7)
    words = random_words(3, 5, ids, 1, 2, num_blocks=2)
    np.testing.assert_array_equal(uniform(3, 5, ids, 1, 2, num=6), words[:, :6] / 2**32)


def test_first_block_continues_the_stream() -> None:
    ids = np.arange(5)
    whole = uniform(1, 2, ids, 0, 0, num=40)
    np.testing.assert_array_equal(uniform(1, 2, ids, 0, 0, num=28, first_block=3), whole[:, 12:])


def test_a_sample_does_not_see_its_batch() -> None:
    ids = np.array([10, 2**40 + 7, 3])
    together = uniform(1, 2, ids, 0, 4, num=5)
    for row, sample_id in enumerate(ids):
        np.testing.assert_array_equal(uniform(1, 2, np.array([sample_id]), 0, 4, num=5)[0], together[row])


@pytest.mark.parametrize("change", [{"seed": 1 << 32}, {"epoch": 1}, {"view": 1}, {"op": 1}])
def test_every_part_of_the_address_counts(change: dict[str, int]) -> None:
    address = {"seed": 0, "epoch": 0, "view": 0, "op": 0}
    ids = np.arange(100)
    base = uniform(sample_ids=ids, num=4, **address)
    other = uniform(sample_ids=ids, num=4, **(address | change))
    assert not np.any(base == other)


def test_moments() -> None:
    numbers = uniform(0, 0, np.arange(50_000), 0, 0, num=4)
    assert abs(numbers.mean() - 1 / 2) < 0.003  # 3 sigma is .0019
    assert abs(numbers.var() - 1 / 12) < 0.001
    assert np.all(np.abs(np.corrcoef(numbers.T) - np.eye(4)) < 0.02)


@pytest.mark.parametrize(
    "bad", [{"seed": -1}, {"seed": 2**64}, {"epoch": 2**32}, {"view": 2**16}, {"op": 256}, {"first_block": 256}]
)
def test_address_out_of_range(bad: dict[str, int]) -> None:
    address = {"seed": 0, "epoch": 0, "view": 0, "op": 0} | bad
    with pytest.raises(ValueError, match=next(iter(bad)).replace("first_", "")):
        uniform(sample_ids=np.arange(2), num=4, **address)
