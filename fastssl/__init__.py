"""fastssl: pre-training of image encoders without labels, fast from the file to the gradient."""

from importlib.util import find_spec
from pathlib import Path

__version__ = "0.1.0.dev0"

_ROOT = Path(__file__).resolve().parent.parent


def _check_siblings() -> None:
    """Refuse to run with another project's `kernels` or `pipelines`: a public package named kernels exists."""
    for name in ("kernels", "pipelines"):
        spec = find_spec(name)
        found = Path(spec.origin).resolve().parent if spec and spec.origin else None
        if found != _ROOT / name:
            raise ImportError(
                f"fastssl needs its own package {name} at {_ROOT / name}, but Python finds {found}: "
                f"put {_ROOT} first on PYTHONPATH, or uninstall the other package."
            )


_check_siblings()
