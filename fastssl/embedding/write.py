"""From images to a table of their features, on one or on several processes, with the same rows in the same order."""

# N images, n of a batch, F features, S side of a view in pixels, W processes

import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from fastssl import __version__, collectives
from fastssl.checkpoint.checksums import sha256_of
from fastssl.checkpoint.save_load import find_weights
from fastssl.embedding.images import Entry, Images, open_images
from fastssl.embedding.table import Piece, TableWriter, check_out, open_table
from fastssl.encoder import Encoder, encode_views, load_encoder
from fastssl.errors import UserError
from fastssl.evaluation.features import eval_mode
from pipelines.convert import bounded_map
from pipelines.convert.images import CorruptImageError, quiet_pillow
from pipelines.errors import DataError
from pipelines.loader import cores_per_process
from pipelines.preprocessing import describe_preprocessing
from pipelines.printable import printable
from pipelines.progress import Progress

T = TypeVar("T")
_MAX_BATCHES = 8  # that a process encodes between two exchanges with the others
_MAX_SHOWN = 10  # broken images in the report


@dataclass(kw_only=True)
class EmbedReport:
    """Result of an embedding.

    Attributes:
        out: The table.
        num_images: Number of its rows.
        num_broken: Number of rows without features.
        num_features: F.
        device: Kind of the device that computed them: cpu or cuda.
        examples: The first broken images and the reasons.
        wall_s: Duration in seconds.
    """

    out: Path
    num_images: int
    num_features: int
    device: str
    num_broken: int = 0
    examples: list[tuple[str, str]] = field(default_factory=list)
    wall_s: float = 0.0


class _Prepared(NamedTuple):
    path: str
    label: int
    view: Tensor | None
    reason: str | None


def load_model(path: str | Path, device: torch.device | str) -> tuple[Encoder, dict[str, Any]]:
    """Load the encoder of a run's folder, a checkpoint's folder or a weights.pt.

    Returns:
        The encoder on the device, and what a table says of it, JSON values: the path of its weights.pt, the SHA-256 of
        that file, and the pre-processing.

    Raises:
        ConfigError: see `fastssl.load_encoder`.
    """
    weights = find_weights(path).absolute()
    encoder = load_encoder(weights).to(device)
    about = {"model": str(weights), "weights_sha256": sha256_of(weights)}
    return encoder, about | {"preprocessing": describe_preprocessing(encoder.views)}


def embed_to_file(
    images: str | Path,
    model: str | Path,
    out: str | Path,
    *,
    kind: str | None = None,
    options: Mapping[str, Any] | None = None,
    batch_size: int = 256,
    device: str | torch.device = "cpu",
    overwrite: bool = False,
) -> EmbedReport:
    """Write the features of images to a table (all ranks call it; the first one writes).

        fastssl.embed_to_file("photographs/", "runs/a", "photographs.parquet")

    A batch holds `batch_size` consecutive images of the source, without the broken ones, on any number of processes.
    The features of a row therefore do not depend on the number of processes (on a CPU: at equal threads per process).

    Args:
        images: A folder, a .beton file and more, see `fastssl.embedding.images.open_images`; the same on each rank.
        model: A run's folder, a checkpoint's folder or a weights.pt.
        out: X.parquet or X.npy, see `fastssl.embedding.table.open_table`.
        kind: See `open_images`.
        options: See `open_images`.
        batch_size: Number of images per forward pass.
        device: Where the encoder computes.
        overwrite: Replace an existing file.

    Returns:
        The report; on other ranks than the first, without the broken images.

    Raises:
        UserError: `out` exists, the model cannot be loaded, or batch_size is below 1.
        DataError: a source that cannot be read, images that are all broken, ranks with different images or weights,
            or a file that cannot be written. Raised on every rank, but where the finished table cannot get its name,
            on the first alone; no file is left.
    """
    started_s = time.monotonic()
    out = Path(out)
    if batch_size < 1:
        raise UserError(f"--batch-size must be >= 1, got {batch_size}")
    _on_all(lambda: check_out(out, overwrite=overwrite) if collectives.rank() == 0 else None)
    source = _on_all(lambda: open_images(str(images), kind, options))
    encoder, about = _on_all(lambda: load_model(model, device))
    identity = (source.fingerprint, source.num_images, about["weights_sha256"], batch_size)
    if len(set(collectives.all_gather_object(identity))) > 1:
        raise DataError(f"{source.name}: the processes see different images or weights; all need the same files")
    about |= {"fastssl": __version__, "source": dict(source.origin), "fingerprint": source.fingerprint}
    about |= {"class_names": source.class_names} if source.class_names else {}
    report = EmbedReport(
        out=out,
        num_images=source.num_images,
        num_features=encoder.num_features,
        device=torch.device(device).type,
    )
    if collectives.rank() == 0:
        for note in source.notes:
            print(printable(note), file=sys.stderr)
        table = open_table(out, num_rows=source.num_images, num_features=encoder.num_features, about=about)
        progress = Progress(out.name, source.num_images, file=sys.stderr)
    else:
        table, progress = nullcontext(), nullcontext()
    with ExitStack() as stack, quiet_pillow():
        writer = _on_all(lambda: stack.enter_context(table))
        bar = stack.enter_context(progress)
        for pieces in _rounds(source, encoder, batch_size):
            _on_all(lambda pieces=pieces: _take(pieces, writer, bar, report))
        if report.num_broken == source.num_images:
            path, reason = report.examples[0]
            raise DataError(f"{source.name}: all {report.num_broken} images are broken: {path}: {reason}")
    report.wall_s = time.monotonic() - started_s
    return report


def _take(
    pieces: list[Piece | Exception] | None, writer: TableWriter | None, bar: Progress | None, report: EmbedReport
) -> None:
    """Write one round's pieces, on the first rank."""
    if pieces is None or writer is None or bar is None:
        return
    for piece in pieces:
        if isinstance(piece, Exception):
            raise piece
        broken = [(path, why) for path, why in zip(piece.paths, piece.errors, strict=True) if why is not None]
        report.num_broken += len(broken)
        report.examples += broken[: _MAX_SHOWN - len(report.examples)]
        try:
            writer.write(piece)
        except OSError as error:
            raise DataError(f"{report.out}: cannot be written ({error.strerror or error})") from None
        bar.advance(len(piece.paths))


def _on_all(call: Callable[[], T]) -> T:
    """Call on every rank; a user's error of one rank is raised on all, so that none waits for it.

    Raises:
        UserError, DataError: the first rank's that has one.
    """
    value, error = None, None
    try:
        value = call()
    except (UserError, DataError) as raised:
        error = raised
    found = next((each for each in collectives.all_gather_object(_sendable(error)) if each is not None), None)
    if found is not None:
        raise found
    return value  # pyright: ignore[reportReturnType]


def _sendable(error: Exception | None) -> Exception | None:
    return error if error is None else type(error)(str(error))


def _rounds(images: Images, encoder: Encoder, batch_size: int) -> Iterator[list[Piece | Exception] | None]:
    """Yield the pieces of all ranks, in the order of the images; None on other ranks than the first.

    The images are divided into blocks of whole batches; rank r encodes block r, r + W, ...
    """
    rank, world_size = collectives.rank(), collectives.world_size()
    num_batches = -(-images.num_images // batch_size)
    per_block = max(1, min(_MAX_BATCHES, num_batches // (2 * world_size))) if world_size > 1 else 1
    block = per_block * batch_size
    starts = range(0, images.num_images, block)
    own = [(start, min(start + block, images.num_images)) for start in starts[rank::world_size]]
    with closing(_pieces(images, encoder, batch_size, own)) as pieces:
        for first in range(0, len(starts), world_size):
            mine: list[Piece | Exception] = []
            if first + rank < len(starts):
                start, stop = own[first // world_size]
                try:
                    mine += islice(pieces, -(-(stop - start) // batch_size))
                except (UserError, DataError) as error:
                    mine.append(_sendable(error) or error)
            gathered = collectives.gather_on_first(mine)
            yield None if gathered is None else list(chain.from_iterable(gathered))


def _pieces(
    images: Images, encoder: Encoder, batch_size: int, spans: list[tuple[int, int]]
) -> Generator[Piece, None, None]:
    """Encode spans of images batch by batch; the next ones are read meanwhile.

    With one process the spans follow one another and the source is read in one go: to skip costs a read in a tar file.
    """
    if collectives.world_size() == 1:
        spans = [(0, images.num_images)]

    def prepare(entry: Entry) -> _Prepared:
        try:
            return _Prepared(entry.path, entry.label, encoder.transform(entry.read()), None)
        except CorruptImageError as error:
            return _Prepared(entry.path, entry.label, None, str(error))

    pool = ThreadPoolExecutor(cores_per_process(), thread_name_prefix="fastssl-embed")
    entries = chain.from_iterable(images.entries(start, stop) for start, stop in spans)
    with eval_mode(encoder), closing(bounded_map(prepare, entries, pool, max_ahead=2 * batch_size)) as prepared:
        for start, stop in spans:
            for first in range(start, stop, batch_size):
                batch = list(islice(prepared, min(batch_size, stop - first)))
                if len(batch) < min(batch_size, stop - first):
                    raise DataError(f"{images.name}: changed while it was read; embed again")
                yield _encode(encoder, batch)


def _encode(encoder: Encoder, batch: list[_Prepared]) -> Piece:
    errors = [each.reason for each in batch]
    features = np.full((len(batch), encoder.num_features), np.nan, np.float32)
    if views := [each.view for each in batch if each.view is not None]:
        try:
            features[[reason is None for reason in errors]] = encode_views(encoder, torch.stack(views)).numpy()
        except torch.OutOfMemoryError:
            raise UserError(f"a batch of {len(batch)} images does not fit into the GPU: lower --batch-size") from None
    for i in np.flatnonzero(~np.isfinite(features).all(1)).tolist():
        features[i] = np.nan
        errors[i] = errors[i] or "its features are not finite"
    return Piece([each.path for each in batch], [each.label for each in batch], errors, features)
