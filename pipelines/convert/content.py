"""What a file holds, judged by its first bytes, and which files count as images."""

import os
import re
from functools import cache
from importlib.util import find_spec

from pipelines.files import open_regular

HEAD_BYTES = 64
EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".avif")
)
HEIC = "HEIF"  # the name under which pillow-heif registers itself with Pillow
HEIC_EXTENSIONS = frozenset((".heic", ".heif", ".hif"))
# Files of cameras are TIFF files in which Pillow finds only a thumbnail.
RAW_EXTENSIONS = frozenset(
    (
        *(".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".iiq", ".kdc", ".mef"),
        *(".mos", ".mrw", ".nef", ".nrw", ".orf", ".pef", ".raf", ".rw2", ".sr2", ".srf", ".srw", ".x3f"),
    )
)
HINTS = (
    dict.fromkeys(HEIC_EXTENSIONS, "pip install pillow-heif")
    | dict.fromkeys(RAW_EXTENSIONS, "export them as JPEG or TIFF")
    | dict.fromkeys((".tar", ".tgz"), "--from webdataset reads a tar")
    | {".parquet": "--from parquet reads it", ".npz": "--from npz reads it", ".zip": "unpack it", ".rar": "unpack it"}
)  # what to do with files that are left out, by kind

_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_IMAGES = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "AVIF")
_SIGNATURES = (
    (rb"\xff\xd8\xff", "JPEG"),
    (rb"\x89PNG\r\n\x1a\n", "PNG"),
    (rb"GIF8[79]a", "GIF"),
    (rb"BM.{4}\0{4}.{4}[\x0c\x10\x28\x34\x38\x40\x6c\x7c]\0\0\0", "BMP"),
    (rb"RIFF.{4}WEBP", "WEBP"),
    (rb"II[*+]\0|MM\0[*+]", "TIFF"),
    (rb"P[1-6]\s+[\d#]", "PPM"),
    (rb".{4}ftypqt  |.{4}ftyp(isom|iso\d|mp4\d|M4V|avc1)", "a video"),
    (rb"RIFF.{4}AVI |\x1a\x45\xdf\xa3", "a video"),
    (rb"\0\0\0\x0cJXL |\xff\x0a", "JPEG XL"),
    (rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51", "JPEG 2000"),
    (rb"8BPS", "a Photoshop file"),
    (rb"%PDF", "a PDF"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "PostScript"),
    (rb"PK\x03\x04|PK\x05\x06", "a zip archive"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|Rar!", "a compressed file"),
    (rb"PAR1", "parquet"),
    (rb"version https://git-lfs", "a Git LFS pointer: run git lfs pull"),
    (rb"(?i)\s*<(!doctype )?html", "a web page"),
    (rb"(?i)\s*<(\?xml|svg)", "XML or SVG"),
)
_PATTERNS = tuple((re.compile(pattern, re.DOTALL), name) for pattern, name in _SIGNATURES)
_TEXT = re.compile(rb"[\t\n\r\x20-\x7e\x80-\xff]*")


def format_of(data: bytes) -> str | None:
    """Name of a format by a file's first bytes, as Pillow's for images; None: unknown."""
    head = data[:HEAD_BYTES]
    if head[4:8] == b"ftyp":
        brands = {head[i : i + 4] for i in range(8, min(len(head), int.from_bytes(head[:4], "big")), 4)}
        if brands & {b"avif", b"avis"}:
            return "AVIF"
        if brands & _HEIC_BRANDS:
            return HEIC
    found = next((name for pattern, name in _PATTERNS if pattern.match(head)), None)
    return found or ("text" if _is_text(head) else None)


@cache
def can_read_heic() -> bool:
    """Whether pillow-heif is installed."""
    return find_spec("pillow_heif") is not None


@cache
def register_heic() -> None:
    """Let Pillow open HEIC files by pillow-heif, which must be installed."""
    import pillow_heif  # pyright: ignore[reportMissingImports]

    pillow_heif.register_heif_opener()


def is_image_name(path: str) -> bool:
    """Whether a file name is that of an image: it has an image extension and is not hidden."""
    name = os.path.basename(path)
    return has_image_extension(name) and not name.startswith(".")


def has_image_extension(name: str) -> bool:
    """Whether images with this extension are read here."""
    extension = os.path.splitext(name)[1].lower()
    return extension in EXTENSIONS or (extension in HEIC_EXTENSIONS and can_read_heic())


def why_no_image(path: str, num_bytes: int) -> str | None:
    """Why a regular file is left out, as a kind to count it under; None: it is an image, or has the name of one.

    An image extension is enough, since converting reads the file anyway. Any other file is opened and its first bytes
    decide.

    Args:
        path: The file.
        num_bytes: Its size.
    """
    name = os.path.basename(path)
    extension = os.path.splitext(name)[1].lower()
    if name.startswith("."):
        return "hidden"
    if has_image_extension(name):
        return None
    if not num_bytes:
        return "empty"
    if extension in RAW_EXTENSIONS:
        return extension
    try:
        with open_regular(path) as file:
            found = format_of(file.read(HEAD_BYTES))
    except OSError:
        return "unreadable"
    if found in _IMAGES or (found == HEIC and can_read_heic()):
        return None
    if found == HEIC:
        return ".heic"
    return extension if re.fullmatch(r"\.\w{1,12}", extension) else f"without extension: {found or 'unknown'}"


def _is_text(head: bytes) -> bool:
    return bool(head) and _TEXT.fullmatch(head) is not None
