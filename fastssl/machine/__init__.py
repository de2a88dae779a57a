"""This machine: versions, hardware, NVIDIA GPUs and their driver, files that survive a crash."""
