"""The C++ side: kernels, their compilation, weight layouts."""
