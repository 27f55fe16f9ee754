"""The CUDA target: planned program -> launches of Triton kernels, cubins, and what describes them."""
