import os

os.environ.setdefault("MPLBACKEND", "agg")
if "PYTEST_XDIST_WORKER" in os.environ:  # there is a process for every core already
    os.environ.setdefault("OMP_NUM_THREADS", "1")
