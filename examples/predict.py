"""Classify images with an exported file on a device: onnxruntime, numpy and pillow, nothing of this project.

pip install onnxruntime numpy pillow
python predict.py model.onnx image.jpg ...
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image

model, *images = sys.argv[1:]
session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
expected = json.loads(session.get_modelmeta().custom_metadata_map["edgeqat"])["input"]
mean, std = (np.array(expected[key], np.float32) for key in ("mean", "std"))

for name in images:
    picture = (
        Image.open(name, formats=("JPEG", "PNG", "WEBP"))
        .convert("RGB")
        .resize((expected["size"],) * 2, Image.Resampling.BILINEAR)
    )
    pixels = (np.asarray(picture, np.float32) / 255 - mean) / std
    (logits,) = session.run(None, {session.get_inputs()[0].name: pixels.transpose(2, 0, 1)[None]})
    print(f"{name}: {expected['classes'][int(logits[0].argmax())]}")
