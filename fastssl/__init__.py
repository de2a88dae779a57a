"""fastssl: pre-training of image encoders without labels, fast from the file to the gradient.

    import fastssl

    run = fastssl.train("configs/demo.yaml", {"run.dir": "runs/a"})
    encoder = fastssl.load_encoder("runs/a")
    features = fastssl.embed(encoder, "photographs/")
    loss = fastssl.losses.Mio(temperature_negative=0.2)(z_a, z_b)

docs/api.md documents the names below. They are imported when they are used: `import fastssl` imports no torch.
"""

import importlib
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastssl import errors, functional, losses
    from fastssl.commands.train.train_images import train_images
    from fastssl.config import Config, load_config
    from fastssl.embedding.neighbours import neighbours
    from fastssl.embedding.write import embed_to_file
    from fastssl.encoder import Encoder, embed, load_encoder
    from fastssl.export.export_encoder import export_encoder
    from fastssl.trainer import Trainer, train

__version__ = "0.1.0.dev0"
__all__ = [
    "Config",
    "Encoder",
    "Trainer",
    "embed",
    "embed_to_file",
    "errors",
    "export_encoder",
    "functional",
    "load_config",
    "load_encoder",
    "losses",
    "neighbours",
    "train",
    "train_images",
]

# Where a public name is found; None: it is a module.
_PUBLIC = {
    "Config": "fastssl.config",
    "Encoder": "fastssl.encoder",
    "Trainer": "fastssl.trainer",
    "embed": "fastssl.encoder",
    "embed_to_file": "fastssl.embedding.write",
    "errors": None,
    "export_encoder": "fastssl.export.export_encoder",
    "functional": None,
    "load_config": "fastssl.config",
    "load_encoder": "fastssl.encoder",
    "losses": None,
    "neighbours": "fastssl.embedding.neighbours",
    "train": "fastssl.trainer",
    "train_images": "fastssl.commands.train.train_images",
}
_ROOT = Path(__file__).resolve().parent.parent


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    module = _PUBLIC[name]
    found = importlib.import_module(module or f"{__name__}.{name}")
    value = globals()[name] = found if module is None else getattr(found, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})


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
