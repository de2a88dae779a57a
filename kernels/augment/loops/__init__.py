"""The loops of the pixel op on the CPU, compiled by numba as parts of kernels/augment/cpu.py."""
