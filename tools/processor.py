"""For benchmarks, which name the processor that they ran on."""

from edgeqat.processor import processor as processor
