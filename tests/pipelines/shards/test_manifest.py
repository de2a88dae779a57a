"""Manifests: what they say of a data set, and that whatever else is in their place is one line."""

import json
import time
from dataclasses import replace

import numpy as np
import pytest

from pipelines.beton import JPG, RAW
from pipelines.errors import DataError
from pipelines.shards.manifest import MAX_MANIFEST_BYTES, Manifest, Shard

SHARD = Shard("a.beton", 10, 9_000, 500, 4, "ab" * 32, '"etag"', (8, 12))
SMALL = Manifest((SHARD, replace(SHARD, name="b/b.beton", rows_sha256="cd" * 32, etag=None)), ["cat", "dög"], [9, 7])


def entries(manifest: Manifest = SMALL) -> dict:
    return json.loads(manifest.to_json())


def changed(**new: object) -> bytes:
    return json.dumps(entries() | new).encode()


def changed_shard(**new: object) -> bytes:
    shards = entries()["shards"]
    return changed(shards=[shards[0] | new, shards[1]])


def refused(text: bytes) -> str:
    """The line that refuses a manifest."""
    with pytest.raises(DataError) as caught:
        Manifest.from_json(text, "x/dataset.json")
    line = str(caught.value)
    assert line.startswith("x/dataset.json: not a manifest (")
    assert line.endswith("); write it again with `fastssl manifest`")
    assert line.isprintable()
    assert len(line) < 400
    return line


def test_round_trip():
    found = Manifest.from_json(SMALL.to_json(), "dataset.json")
    assert found == SMALL
    assert found.to_json() == SMALL.to_json()
    bare = Manifest((replace(SHARD, one_size_px=None),), None, [])
    assert Manifest.from_json(bare.to_json(), "dataset.json") == bare
    odd = replace(SMALL, class_names=["\ud800", "a\nb"])
    assert Manifest.from_json(odd.to_json(), "dataset.json") == odd


def test_a_shard_is_a_line():
    lines = SMALL.to_json().decode().splitlines()
    assert [line for line in lines if ".beton" in line] == lines[-4:-2]


def test_what_a_manifest_knows():
    assert (SMALL.num_images, SMALL.num_bytes, SMALL.image_bytes) == (20, 18_000, 1_000)
    assert SMALL.starts.tolist() == [0, 10, 20]
    assert SMALL.starts.dtype == np.int64
    assert SMALL.one_size_px == (8, 12)
    assert replace(SMALL, shards=(SHARD, replace(SHARD, one_size_px=(8, 13)))).one_size_px is None
    assert replace(SMALL, shards=(SHARD, replace(SHARD, one_size_px=None))).one_size_px is None
    for num_raw, modes in ((0, (JPG,)), (4, (JPG, RAW)), (10, (RAW,))):
        assert Manifest((replace(SHARD, num_raw=num_raw),), None, []).modes == modes


def test_the_identity_is_that_of_the_content():
    digest = SMALL.digest
    assert SMALL.identity == [20, 18_000, int(digest[:8], 16), int(digest[8:16], 16)]
    first, second = SMALL.shards
    moved = replace(SMALL, shards=(replace(first, name="c.beton", etag=None), second))
    assert (moved.digest, moved.identity) == (digest, SMALL.identity)
    others = [
        replace(SMALL, class_names=None),
        replace(SMALL, class_names=["dög", "cat"]),
        replace(SMALL, shards=(second, first)),
        replace(SMALL, shards=(first,)),
        replace(SMALL, shards=(replace(first, num_images=11), second)),
        replace(SMALL, shards=(replace(first, num_bytes=9_001), second)),
        replace(SMALL, shards=(replace(first, rows_sha256="ac" * 32), second)),
    ]
    assert len({digest, *(other.digest for other in others)}) == 8


def test_a_billion_images_load_at_once():
    shards = [Shard(f"x-{k:05d}-of-04000.beton", 250_000, 25 << 30, 24 << 30, 0, f"{k:064x}") for k in range(4000)]
    text = Manifest(tuple(shards), [f"class {k}" for k in range(1000)], [10**6] * 1000).to_json()
    start_s = time.process_time()
    found = Manifest.from_json(text, "dataset.json")
    assert found.starts[-1] == found.num_images == 10**9
    assert time.process_time() - start_s < 0.5
    assert found.starts[2001] == 2001 * 250_000


def test_a_million_classes_fit():
    names = [f"n{k:08d}, one, two, three [four]" for k in range(1_000_000)]
    found = Manifest((replace(SHARD, num_images=10, num_raw=0),), names, [0] * 1_000_000)
    assert Manifest.from_json(found.to_json(), "dataset.json").class_names == names


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"\xff\xfe{}",
        b"[]",
        b"3",
        b"null",
        b'"version"',
        b"{}",
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b"9" * 5_000,
        changed()[:-1],
        changed(x=float("nan")),
        b'{"version": 1, ' + changed()[1:],
        b" " * MAX_MANIFEST_BYTES + b"{}",
    ],
    ids=lambda text: repr(text[:20]),
)
def test_other_files_are_one_line(text):
    refused(text)


@pytest.mark.parametrize("part", [b"[],", b"{},", b'"",', b'{"":[]},'], ids=bytes.decode)
def test_a_hostile_manifest_costs_little(part):
    text = b'{"version": 1, "shards": [' + part * ((100 << 20) // len(part)) + b"0]}"
    start_s = time.process_time()
    assert "104,8" in refused(text)
    assert "more entries than any data set has" in refused(text[: MAX_MANIFEST_BYTES - 2] + b"]}")
    assert time.process_time() - start_s < 1


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("version", 2, "its version is 2, and this fastssl reads 1"),
        ("version", True, "its version is True"),
        ("version", "\x1b[2J" * 100, "its version is '"),
        ("version", [1], "its version is list"),
        ("digest", "0" * 64, "its digest is not that of its entries"),
        ("more", 1, "it has an unknown key, 'more'"),
        ("shards", [], "its shards must be a list of 1 to 99,999"),
        ("shards", {}, "its shards must be a list"),
        ("shards", [3], "its shard 0 is no JSON object"),
        ("shards", [{}], "its shard 0 lacks etag, image_bytes, name"),
        ("class_names", "cat", "its class_names must be null or a list"),
        ("class_names", ["cat", 1], "its class_names must be null or a list"),
        ("class_names", [""] * 1_000_001, "its class_names must be null or a list"),
        ("class_names", ["cat"], "its digest is not that of its entries"),
        ("label_counts", None, "its label_counts must be a list"),
        ("label_counts", [0] * 1_000_001, "its label_counts must be a list of at most 1,000,000 numbers"),
        ("label_counts", [-1], "its label_counts must be a list"),
        ("label_counts", [True], "its label_counts must be a list"),
        ("label_counts", [10**40], "its label_counts must be a list"),
        ("label_counts", [20, 1], "it counts more labels than images"),
    ],
)
def test_an_entry_of_another_kind_is_named(key, value, reason):
    assert reason in refused(changed(**{key: value}))


@pytest.mark.parametrize("key", list(entries()))
def test_a_missing_entry_is_named(key):
    kept = {name: value for name, value in entries().items() if name != key}
    assert ("its version is None" if key == "version" else f"it lacks {key}") in refused(json.dumps(kept).encode())


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("more", 1, "its shard 0 has an unknown key, 'more'"),
        ("name", 3, "name of its shard 0 must be a text"),
        ("name", "b/b.beton", "it lists b/b.beton twice"),
        ("name", "a.tar", "does not end in .beton"),
        ("name", "a\0.beton", "it has a NUL character"),
        ("name", "\ud800.beton", "it is not UTF-8"),
        ("name", "x" * 300 + ".beton", "more than 255"),
        *(
            ("name", name, "it leads outside the data set")
            for name in ("", "/a.beton", "../a.beton", "b/../../a.beton", "b//a.beton", "./a.beton", "s3://b/a.beton")
        ),
        ("num_images", 0, "num_images of its shard 0 must be a number from 1 on, not 0"),
        ("num_images", -1, "must be a number"),
        ("num_images", 1.5, "must be a number"),
        ("num_images", True, "must be a number"),
        ("num_images", "3", "must be a number"),
        ("num_images", 10**400, "must be a number"),
        ("num_images", 376, "the numbers of its shard 0 contradict each other"),
        ("num_bytes", -1, "must be a number"),
        ("num_bytes", 2**62 + 1, "must be a number"),
        ("num_bytes", 2**62, "its shards have 4611686018427396904 bytes together"),
        ("image_bytes", 2**62, "its shards have 4611686018427388404 bytes of images together"),
        ("image_bytes", None, "must be a number"),
        ("num_raw", -1, "must be a number from 0 on"),
        ("num_raw", 11, "the numbers of its shard 0 contradict each other"),
        ("rows_sha256", "AB" * 32, "must be 64 digits"),
        ("rows_sha256", "ab" * 33, "must be 64 digits"),
        ("rows_sha256", "ab" * 32 + "\n", "must be 64 digits"),
        ("etag", "", "must be null or a short text"),
        ("etag", "a\r\nHost: x", "must be null or a short text"),
        ("etag", "x" * 1025, "must be null or a short text"),
        ("etag", 3, "must be null or a short text"),
        ("one_size_px", [1], "must be null or height and width"),
        ("one_size_px", [0, 1], "must be null or height and width"),
        ("one_size_px", [1, 65_536], "must be null or height and width"),
        ("one_size_px", [1, "1"], "must be null or height and width"),
    ],
)
def test_a_bad_entry_of_a_shard_is_named(key, value, reason):
    assert reason in refused(changed_shard(**{key: value}))


@pytest.mark.parametrize("key", list(entries()["shards"][0]))
def test_a_missing_entry_of_a_shard_is_named(key):
    shards = entries()["shards"]
    del shards[1][key]
    assert f"its shard 1 lacks {key}" in refused(changed(shards=shards))


def test_sums_beyond_an_int64_are_refused():
    shards = [replace(SHARD, name=f"{k}.beton", num_images=2**55, num_bytes=2**60) for k in range(5)]
    assert "at most 2**62" in refused(Manifest(tuple(shards), None, []).to_json())
