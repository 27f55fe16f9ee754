"""Out of dcompile: the denoising step as ONNX or as an AOTInductor package; artifacts as folder or file."""
