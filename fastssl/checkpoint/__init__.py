"""Saving and restoring: files of a checkpoint, their checksums, the engine's state, and when to save."""
