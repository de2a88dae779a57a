"""The .beton file: one format for every engine, readable by stock FFCV."""

from pipelines.beton.format import JPG, RAW
from pipelines.beton.identity import Identity
from pipelines.beton.reader import BetonReader, inspect
from pipelines.beton.writer import BetonWriter

__all__ = ["JPG", "RAW", "BetonReader", "BetonWriter", "Identity", "inspect"]
