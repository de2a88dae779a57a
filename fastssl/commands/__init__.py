"""What the command line offers besides training: one module per subcommand that is more than a call."""
