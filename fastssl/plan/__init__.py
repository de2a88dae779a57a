"""From a set of images and a machine to the configuration of a run: facts, choices with reasons, measured time."""
