"""Entry point: `deepspeed fastssl/train.py --cfg configs/X.yaml [--set key=value ...]`, torchrun or python."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # When run as a script, Python puts fastssl/ itself first on the path; the packages are in its parent.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from fastssl.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))

if __name__ == "fastssl.train":  # imported: `fastssl.train` stays the function of that name
    from fastssl.trainer import train

    sys.modules[__name__] = train  # pyright: ignore[reportArgumentType]
