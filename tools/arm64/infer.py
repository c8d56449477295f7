"""Many small models in one process: `infer.py FOLDER` runs all that FOLDER/manifest.json names, on whatever processor.

The manifest is a list of {model, level, options, inputs: {name: {type, shape, file}}, outputs: {name: file}}; tensors are raw
bytes. `tools/audit_operators.py` writes it and reads the outputs; `tools/wasm/infer.mjs` does the same in Node.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

LEVELS = {
    "disabled": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}


def infer(folder: Path, entry: dict[str, Any]) -> None:
    options = ort.SessionOptions()
    options.graph_optimization_level = LEVELS[entry["level"]]
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    for key, value in entry["options"].items():
        options.add_session_config_entry(key, value)
    session = ort.InferenceSession(str(folder / entry["model"]), options, providers=["CPUExecutionProvider"])
    feeds = {}
    for name, given in entry["inputs"].items():
        feeds[name] = np.fromfile(folder / given["file"], given["type"]).reshape(given["shape"])
    names = list(entry["outputs"])
    for name, result in zip(names, session.run(names, feeds), strict=True):
        (folder / entry["outputs"][name]).write_bytes(np.ascontiguousarray(result).tobytes())


if __name__ == "__main__":
    place = Path(sys.argv[1])
    for one in json.loads((place / "manifest.json").read_text()):
        infer(place, one)
    print(ort.__version__)
