"""Passes over the skeleton: each does one thing and returns whether it changed anything.

After `to_integers` the skeleton is *canonical*: every quantized Conv or Gemm reads codes and a marked weight, every value
that is quantized is marked right where an integer kernel ends, batch norms and clip activations live in the layers'
scale and bias and in the quantizers' bounds, and no scale leaves a result to the runtime's way of rounding.
"""

from export.passes.pipeline import to_integers as to_integers
