"""Loads the C libraries that setup.py compiles next to their sources."""

import ctypes
import hashlib
from pathlib import Path


def load_compiled(source: Path, needs: str) -> tuple[ctypes.CDLL, Path]:
    """The library that was compiled from a C file, loaded, and its path.

    Args:
        source: The C file; its function `NAME_source` returns the checksum of the file that was compiled.
        needs: What the installation lacked if there is no library.
    Raises:
        ImportError: there is no library, it cannot be loaded, or it is of another version of the file.
    """
    paths = sorted(source.parent.glob(f"_{source.stem}*.so"))
    if not paths:
        raise ImportError(f"it was not compiled: the installation found {needs}")
    try:
        library = ctypes.CDLL(str(paths[0]))
        read_checksum = getattr(library, f"{source.stem}_source")
        read_checksum.restype = ctypes.c_char_p
        source_sha256 = read_checksum().decode()
    except (OSError, AttributeError) as error:
        raise ImportError(f"{paths[0].name} cannot be loaded ({error})") from error
    if source_sha256 != hashlib.sha256(source.read_bytes()).hexdigest():
        raise ImportError(f"{paths[0].name} was compiled from another version of {source.name}")
    return library, paths[0]
