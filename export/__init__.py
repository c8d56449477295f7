"""Lowering of trained low-bit models to ONNX, with a certificate that the codes in the file are the trained ones."""
