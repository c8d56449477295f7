"""edgeqat: quantization-aware training of vision backbones for edge devices and unseen domains."""

__version__ = "0.1.0"
