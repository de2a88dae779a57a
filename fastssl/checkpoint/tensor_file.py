"""Reading a file that `torch.save` wrote: its tensors and plain values, or one error for damaged bytes."""

import warnings
import zipfile
from pathlib import Path
from typing import Any, TypeGuard

import torch

from fastssl.errors import ConfigError, UserError
from pipelines.files import open_regular


class DamagedError(ConfigError):
    """A file of a checkpoint differs from what was written; the message is one line that names the file."""


def read_tensors(path: Path, *, is_checked: bool) -> Any:
    """The content of a file from `torch.save`, on the CPU; memory is bounded by the size of the file.

    Args:
        path: The file.
        is_checked: Its checksum was compared already. Otherwise the CRC-32 of each of its parts is, which torch skips.
    Raises:
        DamagedError: it cannot be read, is damaged or something else.
        UserError: it is whole, but cannot be read here and now.
    """
    try:
        _check_parts(path, is_checked=is_checked)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch describes files that it is about to refuse
            return torch.load(path, map_location="cpu", weights_only=True)
    except DamagedError:
        raise
    except OSError as error:
        kind = UserError if is_checked else DamagedError
        raise kind(f"{path} cannot be read ({error.strerror or error})") from None
    except Exception as error:  # damaged bytes raise whatever the objects raise that they happen to name
        if is_checked and is_out_of_memory(error):
            raise UserError(f"{path} cannot be read: out of memory") from None
        raise DamagedError(f"{path} is not a file of fastssl, or it is damaged ({type(error).__name__})") from None


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation has failed, on the host."""
    return isinstance(error, MemoryError) or "not enough memory" in str(error)


def is_state(value: Any) -> TypeGuard[dict[str, torch.Tensor]]:
    """Whether a value is a state dict: tensors by name."""
    return isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(item, torch.Tensor) for name, item in value.items()
    )


def _check_parts(path: Path, *, is_checked: bool) -> None:
    """`torch.save` does not compress: a part that claims to be larger than the file would fill the memory."""
    with open_regular(path) as file, zipfile.ZipFile(file) as archive:
        parts = archive.infolist()
        is_plain = all(p.compress_type == zipfile.ZIP_STORED and p.file_size == p.compress_size for p in parts)
        if not is_plain or sum(part.file_size for part in parts) > path.stat().st_size:
            raise DamagedError(f"{path} is not a file of fastssl, or it is damaged (it is compressed)")
        if not is_checked and (name := archive.testzip()) is not None:
            raise DamagedError(f"{path} is damaged: the CRC-32 of its part {name!r} is another")
