"""The predictor of objectives that compare a prediction with a target; it is trained as part of the loss."""

from torch import nn


def build_predictor(projector_dim: int, hidden_dim: int) -> nn.Sequential:
    """D-hidden-BN-ReLU-D, as in BYOL and SimSiam; the layer before the batch norm has no bias.

    The batch-norm statistics are over all views of the local batch.
    """
    return nn.Sequential(
        nn.Linear(projector_dim, hidden_dim, bias=False),
        nn.BatchNorm1d(hidden_dim),
        nn.ReLU(inplace=True),
        nn.Linear(hidden_dim, projector_dim),
    )
