"""`python -m tests.quantizers.compiled`: Triton's machine code (PTX) of every kernel, as JSON by name; alone, since
Triton can take its process down (see test_triton.py)."""

import itertools
import json
import warnings

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qat.quantizers import lsq_triton

PASSES = ("forward", "backward")
INNERS = (1, None)
ELEMENTS = ("*fp32", "*bf16")


def name_of(pass_: str, inner: int | None, element: str) -> str:
    return f"{pass_} {inner} {element}"


def compile_kernel(pass_: str, inner: int | None, element: str) -> str:
    """PTX for compute capability 8.0."""
    kernel = getattr(lsq_triton, f"_{pass_}")
    types = dict.fromkeys(kernel.arg_names, element) | {"raw_scales": "*fp32", "partial": "*fp32", "inner": "i32"}
    types |= dict.fromkeys(("positions", "channels"), "i32") | dict.fromkeys(("low", "high", "ceiling"), "fp32")
    fixed = {"C": 32, "R": 32} | ({} if inner is None else {"inner": inner})
    signature = {name: "constexpr" if name in fixed else types[name] for name in kernel.arg_names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Triton's own
        made = triton.compile(
            ASTSource(fn=kernel, signature=signature, constexprs=fixed), target=GPUTarget("cuda", 80, 32),
            options=lsq_triton.OPTIONS,
        )  # fmt: skip
    return str(made.asm["ptx"])


if __name__ == "__main__":
    kinds = itertools.product(PASSES, INNERS, ELEMENTS)
    print(json.dumps({name_of(*kind): compile_kernel(*kind) for kind in kinds}))
