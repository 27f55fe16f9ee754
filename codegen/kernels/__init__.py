"""Triton kernels: one family a module, each beside its formula; `variant.py` says what one is as data."""
