"""Decoding policies as plain traced torch functions, one a file."""
