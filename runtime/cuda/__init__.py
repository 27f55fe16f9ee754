"""Runs artifacts compiled for NVIDIA GPUs: the driver alone, no compiler and no CUDA toolkit."""
