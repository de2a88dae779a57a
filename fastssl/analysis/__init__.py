"""What a trained run's loss looks like from where it stands: the Hessian's spectrum, the gradient pair by pair."""
