"""Files that several workers write and read, in the middle of a window."""

import shutil
import tempfile
from pathlib import Path

import cases
import tensorflow as tf
import tf_keras

import ga_transform as ga
from workers import laws

#: A file is written after so many of the batches of three windows: within the second.
DONE, STEPS, WINDOWS = 4, 3, 3
OPTIONS = {"accum_steps": STEPS, "remainder": "carry"}
LEAVING_OUT = {"transforms": [ga.Accumulate(STEPS, remainder="carry", on_nonfinite="micro_batch")]}

MODELS = {
    "dense": laws.Law(options=OPTIONS),
    "sparse": laws.Law(cases.words, laws.SGD, OPTIONS),
    "split": laws.Law(options={**OPTIONS, "micro_batch_size": 2}),
    "no rows": laws.Law(options=OPTIONS, short=6),
    "left out": laws.Law(options=LEAVING_OUT, spoilt={(1, 0): 1}),
    "all left out": laws.Law(options=LEAVING_OUT, spoilt={(1, 0): laws.ALL}),
    "pooled": laws.Law(laws.normed, laws.SGD, {**OPTIONS, "batch_norm": "pooled"}),
    "float16": laws.Law(
        options={**OPTIONS, "precision": ga.Precision("mixed_float16", growth_steps=1)}
    ),
}
for law in MODELS.values():
    law.batches, law.epochs = [STEPS] * WINDOWS, 1


def batches_of(law, workers):
    """The batches of all workers, one after the other."""
    return sum(laws.batches_of(law, workers), [])


def made(law):
    """The model before it is trained."""
    model = laws.build(law, law.optimizer)
    return ga.make_accumulating(model, **law.options)


def write(model, path, kind):
    """Write a model."""
    if kind == "checkpoint":
        return tf.train.Checkpoint(model=model).write(str(path))
    model.save(str(path))
    return str(path)


def read(path, kind, law):
    """A model that goes on from a file."""
    if kind == "checkpoint":
        model = made(law)
        tf.train.Checkpoint(model=model).read(str(path)).assert_existing_objects_matched()
        return model
    return tf_keras.models.load_model(path)


def path_of(folder, kind, index=0):
    """Where a worker writes: the first, whose file is kept, where all can read it."""
    if index:
        folder = tempfile.mkdtemp(prefix=f"worker-{index}-", dir=folder)
    return str(Path(folder) / {"checkpoint": "ckpt", "keras": "m.keras", "h5": "m.h5"}[kind])


def save(strategy, name, kind, folder, done=DONE):
    """Train, save as TensorFlow asks for it, and train on."""
    law, index = MODELS[name], strategy.cluster_resolver.task_id
    tf_keras.backend.set_floatx("float64")
    batches = batches_of(law, strategy.num_replicas_in_sync)
    with strategy.scope():
        model = made(law)
    laws.FEEDS["fit"](strategy, model, batches[:done], 1)
    path = path_of(folder, kind, index)
    write(model, path, kind)
    if index:
        shutil.rmtree(Path(path).parent)
    pending = model.pending_micro_batches
    laws.FEEDS["fit"](strategy, model, batches[done:], 1)
    return {**laws.state_of(model), "saved": pending}


def go_on(strategy, name, kind, folder, done=DONE):
    """Train on from a file that some other number of workers has written."""
    law = MODELS[name]
    tf_keras.backend.set_floatx("float64")
    with strategy.scope():
        model = read(path_of(folder, kind), kind, law)
    pending = model.pending_micro_batches
    batches = batches_of(law, strategy.num_replicas_in_sync)
    laws.FEEDS["fit"](strategy, model, batches[done:], 1)
    return {**laws.state_of(model), "loaded": pending}


def train_alone(model, batches):
    """Train on one device, on the rows of all workers."""
    model.fit(cases.dataset(map(cases.concatenate, batches)), verbose=0)
