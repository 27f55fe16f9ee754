"""How a Triton kernel is specialised, compiled and gated."""
