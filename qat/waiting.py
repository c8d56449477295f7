"""How threads of OpenMP wait for each other: asleep.

A training step is thousands of small parallel regions, and its threads meet after each. One that waits actively for another
whose core is busy with something else spins until the scheduler takes its own core away: 8 ms instead of 0.02 for a region,
measured. Asleep, waiting costs next to nothing. OpenMP reads how to wait from the environment, once, when PyTorch is first
imported. GNU's OpenMP, which PyTorch's wheels for Linux bring, also waits all but asleep as soon as it has more threads than
there are cores; so where PyTorch was imported before, a second pool of threads, which does nothing, has the same effect.
"""

import os
import sys
import threading

VARIABLES = frozenset({"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"})
THREAD = "edgeqat: second pool of OpenMP"
# Elements; PyTorch runs operations on fewer than 2^15 per thread in one thread
LARGE = 1 << 17


def asleep() -> None:
    """Have threads of OpenMP wait asleep, unless the user's environment says how they wait."""
    if VARIABLES & os.environ.keys():
        return
    # For PyTorch, if it comes after this, and for processes that are started
    os.environ["OMP_WAIT_POLICY"] = "passive"
    if "torch" in sys.modules and sys.platform == "linux":
        entered = threading.Event()
        threading.Thread(
            target=_hold_a_pool, args=(entered,), name=THREAD, daemon=True
        ).start()
        # A thread that is still within PyTorch when Python ends would abort the process
        entered.wait()


def _hold_a_pool(entered: threading.Event) -> None:
    """Enter one parallel region, which makes a pool of this thread's own, and keep it: it goes when its thread ends."""
    try:
        sys.modules["torch"].ones(LARGE, device="cpu").neg_()
    finally:
        entered.set()
    threading.Event().wait()
