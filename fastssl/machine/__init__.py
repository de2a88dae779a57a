"""This machine: versions, private names of libraries, hardware, NVIDIA GPUs, files that survive a crash."""
