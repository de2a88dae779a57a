"""`fastssl report RUN ...`: the order of events, from folders of runs to a file."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from fastssl.errors import ConfigError, UserError
from fastssl.machine.files import replace_text
from fastssl.report.gather import Gathered, gather
from fastssl.report.page import build_page
from fastssl.report.pictures import Pictures, draw_pictures
from pipelines.errors import DataError
from pipelines.path_names import why_no_path

_INSTALL = "pip install 'plotly>=7,<8'"


def write_report(
    paths: Sequence[Path],
    out: Path | None = None,
    *,
    num_images: int = 2000,
    device: torch.device | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Write one HTML page about runs; it needs no other file and no network.

    Args:
        paths: Folders of runs, finished or not.
        out: The file; an existing one is replaced when the new one is whole. None: report.html in the first run.
        num_images: Most held-out images to encode for each run.
        device: Of the encoders; None: the CPU.
        say: Called with a line for each run without pictures of its encoder.

    Returns:
        The file.

    Raises:
        UserError: plotly is not installed, a folder holds no run, a run is given twice, or the file cannot be written.
    """
    plotly = _plotly()
    if num_images < 3:
        raise UserError(f"--num-images must be >= 3, got {num_images}")
    resolved = [path.resolve() for path in paths]
    if twice := [path for path, real in zip(paths, resolved, strict=True) if resolved.count(real) > 1]:
        raise UserError(f"the run {twice[0]} is given twice")
    runs = [gather(path) for path in paths]
    out = out or paths[0] / "report.html"
    if reason := why_no_path(out):
        raise UserError(f"--out: {str(out)!r:.300} is not a path: {reason}")
    if not out.parent.is_dir() or out.is_dir():
        raise UserError(f"--out: {out} cannot be written: name a file in a folder that exists")
    pictures: list[Pictures | None] = []
    reasons: list[str] = []
    for run in runs:
        found = _pictures(run, num_images, device or torch.device("cpu"))
        is_drawn = isinstance(found, Pictures)
        pictures.append(found if is_drawn else None)
        reasons.append("" if is_drawn else found)
        if not is_drawn:
            say(f"{run.name}: no pictures of the encoder: {found}")
    page = build_page(runs, pictures, reasons, plotly)
    try:
        replace_text(out, page)
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written ({error.strerror})") from None
    return out


def _pictures(run: Gathered, num_images: int, device: torch.device) -> Pictures | str:
    """The pictures, or why there are none: a checkpoint may be missing, damaged or just being replaced."""
    if not any(run.folder.checkpoints.glob("step_*")):
        return "the run has no checkpoint yet"
    try:
        return draw_pictures(run.folder.path, run.folder.load_config(), num_images=num_images, device=device)
    except (ConfigError, DataError) as error:
        return str(error)
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs  # pyright: ignore[reportMissingImports] it is an extra
    except ImportError:
        raise UserError(f"fastssl report needs the package plotly: {_INSTALL}") from None
    return get_plotlyjs()
