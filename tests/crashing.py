"""Trains a model that somebody kills, again and again: run as a script by `test_crashes.py`.

It imports TensorFlow once, then forks a process for each attempt. The one that is left alone
until it is done writes the weights.
"""

import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import tensorflow as tf
import tf_keras

import ga_transform as ga

STEPS, EPOCHS, BATCHES = 3, 6, 7  # the end of an epoch cuts a window off


def batch(number):
    rng = np.random.default_rng(number)
    x = rng.normal(size=[3, 4]).astype("float32")
    return x, x.sum(axis=1, keepdims=True) + 0.1


def build():
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    tf.config.experimental.enable_op_determinism()
    tf_keras.utils.set_random_seed(0)
    layers = [tf_keras.Input([4]), tf_keras.layers.Dense(8, "tanh"), tf_keras.layers.Dense(1)]
    model = tf_keras.Sequential(layers)
    # A trace costs 20 s in each new process of TensorFlow 2.15.
    model.compile("adam", "mse", run_eagerly=tf.__version__ < "2.16")
    return ga.make_accumulating(model, STEPS)


def with_backup(folder, tell):
    """`fit`, with a backup after every batch."""
    model = build()

    def batches():  # `fit` starts anew in the midst of an epoch; its data are to go on there
        for number in range(int(model._train_counter) % BATCHES, BATCHES):
            yield batch(number)

    kinds = (tf.TensorSpec([None, 4]), tf.TensorSpec([None, 1]))
    data = tf.data.Dataset.from_generator(batches, output_signature=kinds)
    backup = tf_keras.callbacks.BackupAndRestore(
        str(folder / "backup"), save_freq=1, delete_checkpoint=False
    )
    telling = tf_keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: tell())
    model.fit(
        data,
        steps_per_epoch=BATCHES,
        epochs=EPOCHS,
        verbose=0,
        callbacks=[telling, backup],
    )
    return model


def with_checkpoints(folder, tell):
    """A loop of one's own, with a checkpoint of model and position after every batch."""
    model = build()
    position = tf.Variable(0)
    checkpoint = tf.train.Checkpoint(model=model, position=position)
    manager = tf.train.CheckpointManager(checkpoint, str(folder), max_to_keep=2)
    manager.restore_or_initialize()
    while int(position) < BATCHES * EPOCHS:
        model.train_on_batch(*batch(int(position)))
        tell()
        position.assign_add(1)
        manager.save()
    model.flush()
    return model


def with_files(folder, tell):
    """A loop of one's own, with the whole model in a `.keras` file after every batch."""
    path = folder / "model.keras"
    model = build()
    if path.exists():
        model = tf_keras.models.load_model(path)
    position = int(model.optimizer.iterations) * STEPS + model.pending_micro_batches
    for number in range(position, BATCHES * EPOCHS):
        model.train_on_batch(*batch(number))
        tell()
        model.save(path)
    model.flush()
    return model


def attempt(train, folder, result, pipe):
    """Train to the end in a process of its own, which tells the pipe of every batch."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        model = train(folder, lambda: os.write(pipe, b"."))
        np.savez(result.with_suffix(".partial.npz"), *model.get_weights())
        result.with_suffix(".partial.npz").rename(result)
        status = 0
    finally:
        traceback.print_exc()
        os._exit(status)


def train_to_the_end(train, folder, kills, rng):
    """The weights, and how often training was killed on the way there: at random moments."""
    folder.mkdir()
    killed = 0
    result = folder / "weights.npz"
    while not result.exists():
        batches, pipe = os.pipe()
        process = attempt(train, folder, result, pipe)
        os.close(pipe)
        if killed < kills:
            for _ in range(rng.randint(1, 2)):
                os.read(batches, 1)
            time.sleep(rng.uniform(0, 0.03))  # in the save, or in the next step
            os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        os.close(batches)
        if os.WIFSIGNALED(status):
            killed += 1
        elif status:
            sys.exit(1)
    with np.load(result) as weights:
        return killed, [weights[name].tobytes() for name in weights.files]


def main(folder, way, kills, seed):
    """Print how often training was killed, and whether it ended with the same bits all the same."""
    train = {"backup": with_backup, "checkpoints": with_checkpoints, "files": with_files}[way]
    rng = random.Random(seed)
    killed, weights = train_to_the_end(train, folder / "killed", kills, rng)
    _, undisturbed = train_to_the_end(train, folder / "undisturbed", 0, rng)
    print(killed, weights == undisturbed)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
