"""Data sets of many .beton files: the rows of each, which a range of bytes reads, and the manifest of all."""
