"""Damaged .beton files, by every engine, `BetonReader`, `inspect` and `verify`.

An image whose record, entry and bytes are whole comes out as from the whole file; all else is one line. The engines run
native code, so the cases run in a child process.
"""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.bad_samples import BadSamples
from pipelines.beton import BetonReader, BetonWriter, inspect
from pipelines.beton.format import ALLOCATION, FIELD, HEADER, METADATA
from pipelines.engines import build_engine
from pipelines.errors import DataError
from pipelines.verify import verify
from pipelines.views import ViewSpec, size_groups
from tests.helpers.fuzz import Case, cases, flip_bits, mutate_bytes, num_cases, overwrite
from tests.helpers.fuzz_child import MAX_GROWTH_BYTES, FuzzChild, fuzz_child
from tests.helpers.plans import draw_of, plan_batches

pytestmark = pytest.mark.timeout(300 + num_cases() // 2)

KINDS = ("raw", "jpeg", "mixed")
NUM_IMAGES, BATCH_SIZE = 10, 4
SPECS = (ViewSpec(size_px=16, crop_scale=(0.2, 1.0)), ViewSpec(size_px=8))
ENGINES = {"ffcv": 0.3, "resident": 0.2, "torch": 0.14, "synthetic": 0.06, "dali": 0.1}  # fractions of the cases
NAMED_FAULTS = (
    *("page_size 0", "page_size absurd", "table in the metadata", "table in the images"),
    *("image in the table", "two images in one place"),
)


@dataclass(frozen=True)
class Whole:
    """A file before it is damaged."""

    path: Path
    data: bytes

    @property
    def tables(self) -> dict[str, tuple[np.dtype, int, int]]:
        """dtype, offset and length of each table."""
        start, header = HEADER.itemsize, np.frombuffer(self.data, HEADER, 1)[0]
        metadata = start + 2 * FIELD.itemsize
        return {
            "header": (HEADER, 0, 1),
            "fields": (FIELD, start, 2),
            "records": (METADATA, metadata, NUM_IMAGES),
            "allocations": (ALLOCATION, int(header["alloc_table_ptr"]), NUM_IMAGES),
        }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small files of each kind, with sidecars, whose data begin after 4 KiB instead of 8 MiB."""
    folder, rng = tmp_path_factory.mktemp("beton"), np.random.default_rng(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.beton.writer.PAGE_BYTES", 4096)
        for kind in KINDS:
            with BetonWriter(folder / f"{kind}.beton", class_names=["a", "b", "c"]) as writer:
                for i in range(NUM_IMAGES):
                    pixels = rng.integers(0, 256, (12 + i % 3, 13 + i % 2, 3), np.uint8)
                    is_raw = kind == "raw" or (kind == "mixed" and i % 2)
                    (write_raw if is_raw else write_jpeg)(writer, pixels, i)
    return folder


def write_raw(writer: BetonWriter, pixels: np.ndarray, i: int) -> None:
    writer.write_raw(pixels, label=i % 3)


def write_jpeg(writer: BetonWriter, pixels: np.ndarray, i: int) -> None:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", progressive=i % 4 == 2, subsampling=i % 3)
    writer.write_jpeg(file.getvalue(), height_px=pixels.shape[0], width_px=pixels.shape[1], label=i % 3)


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FuzzChild]:
    with fuzz_child(tmp_path_factory.mktemp("child") / "log.txt") as child:
        yield child


@pytest.mark.parametrize("engine", ENGINES)
def test_engines(engine: str, folder: Path, child: FuzzChild) -> None:
    child.begin()
    for case in cases(f"beton by {engine}", fraction=ENGINES[engine]):
        child.run(check_engine, case, folder, engine)
    assert child.growth_bytes() < MAX_GROWTH_BYTES


def test_reader_inspect_and_verify(folder: Path, child: FuzzChild) -> None:
    child.begin()
    for case in cases("beton by verify", fraction=0.2):
        child.run(check_verify, case, folder)
    assert child.growth_bytes() < MAX_GROWTH_BYTES


@pytest.mark.parametrize("fault", NAMED_FAULTS)
def test_sizes_of_pages_and_tables_that_overlap(fault: str, folder: Path, child: FuzzChild) -> None:
    """Our readers have no use for the page size; what overlaps a table is refused."""
    rng = np.random.default_rng(0)
    for number, kind in enumerate(KINDS):
        case = Case(fault, number, rng)
        child.run(check_fault, case, folder, kind, fault)


def check_fault(case: Case, folder: Path, kind: str, fault: str) -> None:
    whole = whole_file(folder, kind)
    changed = bytearray(whole.data)
    header = np.frombuffer(changed, HEADER, 1)
    _, metadata_start, _ = whole.tables["records"]
    _, table_start, _ = whole.tables["allocations"]
    records = np.frombuffer(changed, METADATA, NUM_IMAGES, metadata_start)
    if "page_size" in fault:
        header["page_size"] = 0 if "0" in fault else 2**32 - 1
    elif fault == "table in the metadata":
        header["alloc_table_ptr"] = metadata_start + (table_start - metadata_start) % ALLOCATION.itemsize
    elif fault == "table in the images":
        header["alloc_table_ptr"] -= ALLOCATION.itemsize
    elif fault == "image in the table":
        allocations = np.frombuffer(changed, ALLOCATION, NUM_IMAGES, table_start)
        records["f0"]["data_ptr"][-1] = allocations["ptr"][-1] = table_start - 1
    else:
        records[1] = records[0]
    path = damaged_file(folder, bytes(changed))
    for engine in ENGINES:
        reader = open_or_refuse(path)
        assert (reader is not None) == ("page_size" in fault)
        if reader is not None:
            assert_views(reader, whole, folder, engine, max_bad_fraction=0.0)


def check_engine(case: Case, folder: Path, engine: str) -> None:
    whole = whole_file(folder, KINDS[int(case.rng.integers(3))])
    whole_views(folder, whole.path.stem, engine)  # outside the limit of memory: libraries are loaded
    path = damaged_file(folder, damage(whole, case.rng))
    with case.guarded(memory_mb=16 << 10 if engine == "dali" else 2 << 10):
        reader = open_or_refuse(path)
        if reader is not None:
            assert_records(reader, whole)
            assert_views(reader, whole, folder, engine, max_bad_fraction=float(case.rng.integers(2)))


def check_verify(case: Case, folder: Path) -> None:
    """What passes can be decoded whole by the engine, and what does not pass cannot (or its checksum differs)."""
    whole = whole_file(folder, KINDS[int(case.rng.integers(3))])
    whole_views(folder, whole.path.stem, "ffcv")
    data = damage(whole, case.rng)
    has_sidecar = bool(case.rng.integers(2))
    path = damaged_file(folder, data, whole.path.with_name(f"{whole.path.name}.json") if has_sidecar else None)
    with case.guarded(memory_mb=2 << 10):
        reader = open_or_refuse(path)
        message = refusal(path, lambda: verify(path, num_threads=1))
        assert (refusal(path, lambda: inspect(path)) is None) == (reader is not None)
        if reader is None or has_sidecar:
            assert (message is None) == (data == whole.data)
            return
        bad = refusal(path, lambda: views_of(reader, "ffcv", max_bad_fraction=0.0))
        assert (message is None) == (bad is None), (message, bad)


def open_or_refuse(path: Path) -> BetonReader | None:
    found: list[BetonReader] = []
    refusal(path, lambda: found.append(BetonReader(path)))
    return found[0] if found else None


def refusal(path: Path, action: Callable[[], object]) -> str | None:
    """The one line with which a file is refused; None: it is not."""
    try:
        action()
    except DataError as error:
        message = str(error)
    else:
        return None
    assert message.isprintable()
    assert path.name in message
    return message


def assert_records(reader: BetonReader, whole: Whole) -> None:
    """A sample whose record and entry are whole has its size, place and label."""
    expected = BetonReader(whole.path)
    _, metadata_start, _ = whole.tables["records"]
    if reader.mmap[:metadata_start].tobytes() != whole.data[:metadata_start]:
        return
    same = np.arange(min(NUM_IMAGES, reader.num_samples))
    for dtype, start, num in (whole.tables["records"], whole.tables["allocations"]):
        found, right = (np.frombuffer(data, dtype, num, start) for data in (reader.mmap.tobytes(), whole.data))
        same = same[[found[i].tobytes() == right[i].tobytes() for i in same]]
    for name in ("sizes", "labels", "modes", "data_ptr", "data_bytes"):
        np.testing.assert_array_equal(getattr(reader, name)[same], getattr(expected, name)[same])


def assert_views(reader: BetonReader, whole: Whole, folder: Path, engine: str, *, max_bad_fraction: float) -> None:
    """Images that are whole give the views of the whole file; `refusal` of anything else."""
    expected, rows = BetonReader(whole.path), whole_views(folder, whole.path.stem, engine)
    found: dict[int, list[np.ndarray]] = {}
    refusal(reader.path, lambda: views_of(reader, engine, max_bad_fraction=max_bad_fraction, into=found))
    for i, views in found.items():
        is_whole = (
            i < NUM_IMAGES
            and (reader.sizes[i] == expected.sizes[i]).all()
            and reader.modes[i] == expected.modes[i]
            and np.array_equal(reader.image_bytes(i), expected.image_bytes(i))
        )
        if is_whole:
            for view, right in zip(views, rows[i], strict=True):
                np.testing.assert_array_equal(view, right)


def views_of(
    reader: BetonReader, name: str, *, max_bad_fraction: float, into: dict[int, list[np.ndarray]] | None = None
) -> dict[int, list[np.ndarray]]:
    """The views of each sample that was not replaced, by its id."""
    found = {} if into is None else into
    bad_samples = BadSamples(reader.path, reader.num_samples, max_bad_fraction)
    engine = build_engine(
        name, reader, num_workers=1, prefetch_batches=1, device=torch.device("cpu"), bad_samples=bad_samples
    )
    try:
        ids = np.arange(reader.num_samples)
        plans = plan_batches(draw_of(SPECS), ids, reader, BATCH_SIZE)
        for number, raw in enumerate(engine.batches(plans, BATCH_SIZE, size_groups(SPECS))):
            asked = ids[number * BATCH_SIZE : (number + 1) * BATCH_SIZE]
            np.testing.assert_array_equal(raw.labels, reader.labels[raw.sample_ids])
            for row in np.flatnonzero(raw.sample_ids == asked).tolist():
                found[int(asked[row])] = [np.array(group[row]) for group in raw.views]  # pyright: ignore (arrays)
    finally:
        engine.close()
    return found


@cache
def whole_file(folder: Path, kind: str) -> Whole:
    path = folder / f"{kind}.beton"
    return Whole(path, path.read_bytes())


@cache
def whole_views(folder: Path, kind: str, engine: str) -> dict[int, list[np.ndarray]]:
    torch.set_num_threads(1)
    found = views_of(BetonReader(folder / f"{kind}.beton"), engine, max_bad_fraction=0.0)
    assert len(found) == NUM_IMAGES
    return found


def damaged_file(folder: Path, data: bytes, sidecar: Path | None = None) -> Path:
    """Written under a name of its own, with a copy of a sidecar or without one."""
    path = folder / "damaged.beton"
    path.write_bytes(data)
    beside = folder / "damaged.beton.json"
    beside.unlink(missing_ok=True)
    if sidecar:
        beside.write_bytes(sidecar.read_bytes())
    return path


def damage(whole: Whole, rng: np.random.Generator) -> bytes:
    """Change bytes anywhere, numbers of the tables, or the bytes of images."""
    kind, data = int(rng.integers(10)), whole.data
    if kind < 2:
        return mutate_bytes(data, rng)
    for _ in range(int(rng.integers(1, 4))):
        data = edit_image(data, whole, rng) if kind < 5 else edit_table(data, whole, rng)
    return data


def edit_table(data: bytes, whole: Whole, rng: np.random.Generator) -> bytes:
    """Put an odd number, or that of another row, into one place of a table."""
    name = ("header", "fields", "records", "records", "allocations", "allocations")[int(rng.integers(6))]
    dtype, start, num = whole.tables[name]
    changed = bytearray(data)
    columns = list(columns_of(np.frombuffer(changed, dtype, num, start)))
    column = columns[int(rng.integers(len(columns)))]
    row, limits = int(rng.integers(num)), np.iinfo(column.dtype)
    old = int(column[row])
    odd = (0, 1, -1, limits.max, limits.min, limits.max // 2, old - 1, old + 1, old * 2, int(rng.integers(1 << 20)))
    choices = (*odd, old ^ (1 << int(rng.integers(limits.bits))), int(column[int(rng.integers(num))]), len(data))
    column[row] = np.array(choices[int(rng.integers(len(choices)))] % (1 << 64), np.uint64).astype(column.dtype)
    return bytes(changed)


def columns_of(records: np.ndarray) -> Iterator[np.ndarray]:
    """The numbers of a table: views of the buffer, one element a row."""
    if records.dtype.names:
        for name in records.dtype.names:
            yield from columns_of(records[name])
    elif records.ndim > 1:
        yield from records[:, :16].T  # of a field's name and arguments, the start
    else:
        yield records


def edit_image(data: bytes, whole: Whole, rng: np.random.Generator) -> bytes:
    """Change bytes of one image, most often near its start, where a JPEG has its header."""
    dtype, start, num = whole.tables["allocations"]
    entry = np.frombuffer(whole.data, dtype, num, start)[int(rng.integers(num))]
    first, size = int(entry["ptr"]), int(entry["size"])
    if rng.integers(2):
        size = min(size, 200)
    piece = (flip_bits, overwrite)[int(rng.integers(2))](data[first : first + size], rng)
    return data[:first] + piece + data[first + size :]
