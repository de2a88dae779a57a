"""Data sets on object storage."""

from pipelines.remote.store import ObjectInfo, RemoteError, RemoteStore, is_url

__all__ = ["ObjectInfo", "RemoteError", "RemoteStore", "is_url"]
