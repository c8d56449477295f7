import functools
import os
import random
import signal
import sys

import pytest

os.environ.setdefault("MPLBACKEND", "agg")
if "PYTEST_XDIST_WORKER" in os.environ:  # there is a process for every core already
    os.environ.setdefault("OMP_NUM_THREADS", "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what it runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)

SLOW_TIMEOUT = 1800  # seconds


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow") is not None and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Every test, and every fixture made for it, draws the same numbers in whatever order tests run."""
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  # what a library may draw from
    torch.manual_seed(0)
    _keep_translations()
    _take_no_signal_of_a_loaders_worker()


def _keep_translations() -> None:
    """PyTorch's exporter reads the sources of its two thousand translations in every export, for most of a second."""
    registration = sys.modules.get("torch.onnx._internal.exporter._registration")
    registry = getattr(registration, "ONNXRegistry", None)
    if registry is not None and not hasattr(registry.from_torchlib, "cache_info"):
        registry.from_torchlib = staticmethod(functools.cache(registry.from_torchlib))


def _take_no_signal_of_a_loaders_worker() -> None:
    """PyTorch's loaders handle SIGCHLD. On virtual machines with AMX, processes that had used it were seen to end when a
    loader's worker did, before the handler ran. The loader looks after its workers every few seconds without it."""
    from torch.utils.data._utils import signal_handling

    signal_handling._SIGCHLD_handler_set = True
