"""Evaluation of an encoder: the protocols, their data, their results."""
