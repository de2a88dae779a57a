"""Measures data-loading speed: `fastssl bench loader` on a user's file, and shared parts of our benchmarks.

`streams` defines what is measured and `windows` how. `stages` and `disk` measure the parts of a loader in isolation.
`verdict` interprets the figures.
"""
