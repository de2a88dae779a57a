"""Encoders in the forms that other programs read, with a model card."""
