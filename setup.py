"""Packaging. The name on the public index belongs to another project: install from this checkout only."""

from setuptools import find_packages, setup

setup(
    name="fastssl",
    version="0.1.0.dev0",
    description="Fast, trustworthy pre-training of image encoders without labels",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["fastssl*", "pipelines*", "kernels*"]),
    # Versions are pinned in requirements/: torch's build (CPU or CUDA) must be chosen there, not by a resolver here.
    install_requires=[],
    entry_points={"console_scripts": ["fastssl = fastssl.cli:main"]},
    classifiers=["Private :: Do Not Upload"],
)
