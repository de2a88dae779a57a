"""What this machine has: versions, hardware, NVIDIA GPUs and their driver. Imports nothing of fastssl."""
