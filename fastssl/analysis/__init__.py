"""Analyses of a trained run's loss at its current weights: the Hessian's spectrum, the gradient per pair."""
