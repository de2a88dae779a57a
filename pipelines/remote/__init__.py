"""Data sets on object storage: ranges of objects, and blocks of them kept on the node's disk."""

from pipelines.remote.cache import BlockCache
from pipelines.remote.store import ObjectInfo, RemoteError, RemoteStore, is_url

__all__ = ["BlockCache", "ObjectInfo", "RemoteError", "RemoteStore", "is_url"]
