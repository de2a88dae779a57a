"""The sub-commands: NAME.py, or NAME/__init__.py where the work is more than a call, is `fastssl NAME`.

Each has `add_parser`, with its options, and the function that they call. Slow imports wait until that function runs.
"""
