"""Random images as files, Parquet files of them, and folders by class."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image


def picture(seed, *, size=(6, 5), colour=True, kind="PNG"):
    """The file and the pixels (C, H, W) of a random image."""
    width, height = size
    shape = (height, width, 3) if colour else (height, width)
    array = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, format=kind)
    pixels = torch.from_numpy(array.reshape(height, width, -1)).permute(2, 0, 1)
    return stream.getvalue(), pixels


def parquet(path, contents, labels, *, image="image", label="label", names=None, **columns):
    table = pa.table({image: [{"bytes": c, "path": None} for c in contents], label: labels, **columns})
    if names:
        features = {label: {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def classes(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root
