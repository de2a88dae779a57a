"""Lists the image files of a user's folders."""

import os
import stat
from collections import deque
from collections.abc import Sequence

from pipelines.convert.source import is_image_name
from pipelines.errors import DataError


class ImageFiles:
    """Lists the image files below folders; links are followed, and each folder and file is met once.

    Of several names of a file, one without a link on its way comes first, then the first in sorted order. The result
    therefore does not depend on the order in which a directory lists its entries.

    Attributes:
        num_ignored: Number of files that are hidden or have no image extension.
        num_again: Number of further names of folders and image files.
        num_special: Number of sockets, pipes and devices.
    """

    def __init__(self) -> None:
        self.num_ignored = self.num_again = self.num_special = 0
        self._met: set[tuple[int, int]] = set()  # (device, inode)

    def folders_in(self, folder: str) -> list[str]:
        """Sub-folders that are not hidden, sorted; a link to a folder that was met already is left out.

        Raises:
            DataError: the folder cannot be read.
        """
        self._is_new(os.stat(folder))
        entries = [entry for entry in _entries(folder) if _is_folder(entry) and not entry.name.startswith(".")]
        entries.sort(key=lambda entry: entry.is_symlink())
        new = sorted(entry.path for entry in entries if self._is_new(entry.stat()))
        self.num_again += len(entries) - len(new)
        return new

    def find(self, folders: Sequence[str], *, recursive: bool = True) -> list[list[str]]:
        """For each folder, the paths of the image files below it, sorted.

        Args:
            folders: The folders. What a link from one of them into another leads to belongs to the latter.
            recursive: Whether to enter sub-folders.
        Raises:
            DataError: a folder cannot be read.
        """
        found: list[list[str]] = [[] for _ in folders]
        for folder in folders:
            self._is_new(os.stat(folder))
        waiting, links = deque(enumerate(folders)), deque[tuple[int, str]]()
        while waiting:
            k, folder = waiting.popleft()
            for entry in _entries(folder):
                if not recursive and _is_folder(entry):
                    continue
                if entry.is_symlink():
                    links.append((k, entry.path))
                elif self._takes(entry.path, found[k]):
                    waiting.append((k, entry.path))
            while links and not waiting:
                k, path = links.popleft()
                if self._takes(path, found[k]):
                    waiting.append((k, path))
        return [sorted(paths) for paths in found]

    def notes(self, name: str) -> tuple[str, ...]:
        """Lines that say what was left out of the folder `name`."""
        again = f"{name}: {self.num_again:,} further names (links) of files or folders were left out: each counts once"
        special = f"{name}: {self.num_special:,} sockets, pipes or devices were left out"
        return (again,) * bool(self.num_again) + (special,) * bool(self.num_special)

    def _takes(self, path: str, images: list[str]) -> bool:
        """Add a new image file to `images`, or count what else it is; True for a new folder."""
        try:
            status = os.stat(path)
        except OSError:  # a link that leads nowhere: reading the image will say so
            status = None
        if status is None or stat.S_ISREG(status.st_mode):
            if not is_image_name(path):
                self.num_ignored += 1
            elif status is None or self._is_new(status):
                images.append(path)
            else:
                self.num_again += 1
        elif not stat.S_ISDIR(status.st_mode):
            self.num_special += 1
        elif self._is_new(status):
            return True
        else:
            self.num_again += 1
        return False

    def _is_new(self, status: os.stat_result) -> bool:
        key = status.st_dev, status.st_ino
        is_new = key not in self._met
        self._met.add(key)
        return is_new


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror})") from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
