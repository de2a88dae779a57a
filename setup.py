"""Packaging. The name on the public index belongs to another project: install from this checkout only."""

from setuptools import setup

setup(
    name="fastssl",
    version="0.1.0.dev0",
    description="Fast, trustworthy pre-training of image encoders without labels",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        "fastssl",
        "fastssl.analysis",
        "fastssl.doctor",
        "fastssl.evaluation",
        "fastssl.losses",
        "fastssl.models",
        "fastssl.optim",
        "fastssl.step",
        "pipelines",
        "pipelines.bench",
        "pipelines.beton",
        "pipelines.convert",
        "pipelines.engines",
        "kernels",
        "kernels.augment",
        "kernels.gram_loss",
        "kernels.pair_loss",
        "kernels.partition_loss",
        "kernels.similarity",
    ],
    # Versions are pinned in requirements/: torch's build (CPU or CUDA) must be chosen there, not by a resolver here.
    install_requires=[],
    entry_points={"console_scripts": ["fastssl = fastssl.cli:main"]},
    classifiers=["Private :: Do Not Upload"],
)
