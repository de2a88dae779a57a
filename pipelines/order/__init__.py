"""Sample orders of data sets that are too large for a permutation array: pure functions of (seed, epoch)."""
