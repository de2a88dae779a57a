"""One optimizer step: forward, backward, update; skipped without a trace where a gradient is not finite."""
