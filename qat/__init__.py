"""edgeqat: quantization-aware training of vision backbones for edge devices and unseen domains."""

import os

__version__ = "0.1.0"

# A training step is thousands of small parallel regions, and the threads of OpenMP meet after each. Waiting actively for one
# whose core is busy with another process, they take many times the processor time; asleep they cost next to nothing. OpenMP
# reads this once, when PyTorch is first imported; what the user has set stays.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
    os.environ["OMP_WAIT_POLICY"] = "passive"
