"""How fast images are loaded, and by what: `fastssl bench loader` on a user's file, and the parts of our benchmarks.

`streams` is what is measured, `windows` how; `stages` and `disk` are the parts of a loader alone, `verdict` what the
figures say.
"""
