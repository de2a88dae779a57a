"""The processes of a run: start, rendezvous, watching each other, agreeing on one run, and ending on a signal."""
