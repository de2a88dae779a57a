"""How good an encoder is: the protocols, their data, their results."""
