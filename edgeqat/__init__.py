"""What `qat` and `export` both stand on: files, images, compiled libraries, the terminal and signals.

Nothing here imports more than the standard library, NumPy and Pillow: a device that only runs files needs no PyTorch.
"""
