"""Sub-commands of the command line other than training: one module for each that is more than a single call."""
