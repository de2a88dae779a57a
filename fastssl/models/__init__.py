"""Encoders, the two-view model around them, and the moving average of their weights."""
