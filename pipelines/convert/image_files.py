"""Lists the image files of a user's folders."""

import os
import stat
from collections import Counter, deque
from collections.abc import Iterable, Sequence

from pipelines.convert.content import HINTS, is_image_name, why_no_image
from pipelines.errors import DataError
from pipelines.printable import printable

# Kinds of what is left out that have a line of their own.
AGAIN, SPECIAL = "further name", "socket, pipe or device"
MAX_KINDS = 12  # in one line
MAX_KIND_CHARS = 60


class ImageFiles:
    """Lists the image files below folders; links are followed, and each folder and file is met once.

    Of several names of a file, one without a link on its way comes first, then the first in sorted order. The result
    therefore does not depend on the order in which a directory lists its entries. The content decides which files are
    images: see `content.why_no_image`.

    Attributes:
        left_out: (path, kind) of each file or folder that was left out: `AGAIN` for further names of folders and image
            files, `SPECIAL` for sockets, pipes and devices, and the kinds of `content.why_no_image`.
    """

    def __init__(self, met: set[tuple[int, int]] | None = None) -> None:
        """Begin.

        Args:
            met: (device, inode) of the folders and files met so far, to be shared by several lists.
        """
        self.left_out: list[tuple[str, str]] = []
        self._met = met if met is not None else set()

    def folders_in(self, folder: str) -> list[str]:
        """Sub-folders that are not hidden, sorted; a link to a folder that was met already is left out.

        Raises:
            DataError: the folder cannot be read.
        """
        self._is_new(os.stat(folder))
        entries = [entry for entry in _entries(folder) if _is_folder(entry)]
        self.left_out += [(entry.path, "hidden folder") for entry in entries if entry.name.startswith(".")]
        entries = [entry for entry in entries if not entry.name.startswith(".")]
        entries.sort(key=lambda entry: entry.is_symlink())
        is_new = [(entry.path, self._is_new(entry.stat())) for entry in entries]
        self.left_out += [(path, AGAIN) for path, new in is_new if not new]
        return sorted(path for path, new in is_new if new)

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

    def _takes(self, path: str, images: list[str]) -> bool:
        """Add a new image file to `images`, or note what else it is; True for a new folder."""
        try:
            status = os.stat(path)
        except OSError:  # a link that leads nowhere: reading the image will say so
            if is_image_name(path):
                images.append(path)
            else:
                self.left_out.append((path, "link that leads nowhere"))
            return False
        if stat.S_ISDIR(status.st_mode):
            if os.path.basename(path).startswith("."):
                self.left_out.append((path, "hidden folder"))
            elif self._is_new(status):
                return True
            else:
                self.left_out.append((path, AGAIN))
        elif not stat.S_ISREG(status.st_mode):
            self.left_out.append((path, SPECIAL))
        elif (kind := why_no_image(path, status.st_size)) is not None:
            self.left_out.append((path, kind))
        elif self._is_new(status):
            images.append(path)
        else:
            self.left_out.append((path, AGAIN))
        return False

    def _is_new(self, status: os.stat_result) -> bool:
        key = status.st_dev, status.st_ino
        is_new = key not in self._met
        self._met.add(key)
        return is_new


def left_out_lines(name: str, counts: Counter[str]) -> Iterable[str]:
    """Lines that say what was left out of the source `name`, all kinds of it."""
    others = Counter({kind: num for kind, num in counts.items() if kind not in (AGAIN, SPECIAL)})
    if others:
        are = "1 file was" if others.total() == 1 else f"{others.total():,} files were"
        yield f"{name}: {are} left out: {describe_kinds(others)}"
    if counts[AGAIN]:
        yield f"{name}: {counts[AGAIN]:,} further names (links) of files or folders were left out: each counts once"
    if counts[SPECIAL]:
        yield f"{name}: {counts[SPECIAL]:,} sockets, pipes or devices were left out"


def describe_kinds(counts: Counter[str]) -> str:
    """`21 .heic (pip install pillow-heif), 3 .txt, 2 empty`; the most frequent first."""
    parts = [
        f"{num:,} {printable(kind, MAX_KIND_CHARS)}" + (f" ({HINTS[kind]})" if kind in HINTS else "")
        for kind, num in counts.most_common(MAX_KINDS)
    ]
    num_more = counts.total() - sum(num for _, num in counts.most_common(MAX_KINDS))
    return ", ".join(parts + [f"{num_more:,} of other kinds"] * bool(num_more))


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
