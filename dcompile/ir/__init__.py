"""The program: graphs of one denoising iteration, their contract, and how they print."""
