"""Files of what jobs return: nested lists and dicts of numbers, texts and arrays."""

import json
import zipfile
from pathlib import Path

import numpy as np

ARRAY = "npz array"


def name_of(job, index):
    """The file of a worker's answer to its so many-th job."""
    return f"answer-{job}-{index}.npz"


def write(path, answer):
    """Write an answer in one move: whoever sees the file can read it."""
    arrays = {}

    def put(value):
        if isinstance(value, np.generic):
            return value.item()
        name = str(len(arrays))
        arrays[name] = np.asarray(value)
        return {ARRAY: name}

    text = json.dumps(answer, default=put)
    partial = Path(f"{path}.partial")
    with zipfile.ZipFile(partial, "w") as file:
        file.writestr("answer.json", text)
        for name, array in arrays.items():
            with file.open(f"{name}.npy", "w") as part:
                np.lib.format.write_array(part, array, allow_pickle=False)
    partial.rename(path)


def read(path):
    """An answer."""
    with zipfile.ZipFile(path) as file:

        def get(value):
            if ARRAY not in value:
                return value
            with file.open(f"{value[ARRAY]}.npy") as part:
                return np.lib.format.read_array(part, allow_pickle=False)

        return json.loads(file.read("answer.json"), object_hook=get)
