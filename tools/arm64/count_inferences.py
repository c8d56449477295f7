"""Executed instructions of an inference of each file: `count_inferences.py RUNS LIBRARY FOLDER NAME...`.

Each NAME is FOLDER/NAME.onnx, its input FOLDER/NAME.npy. Before and after the counted runs the process asks for its parent's
id, which is where `count_instructions.c` prints what it has counted so far. `tools/count_inferences.py` writes the folder.
"""

import os
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort

runs, library, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
for name in sys.argv[4:]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.register_custom_ops_library(library)
    session = ort.InferenceSession(str(folder / f"{name}.onnx"), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: np.load(folder / f"{name}.npy")}
    session.run(None, feed)  # what the first run alone does, such as allotting memory, does not count
    os.getppid()
    for _ in range(runs):
        session.run(None, feed)
    os.getppid()
