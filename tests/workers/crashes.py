"""Training with a backup, which a worker that is killed does not end."""

import os
import signal
import threading

import cases
import numpy as np
import tensorflow as tf
import tf_keras

import ga_transform as ga
from workers import laws

STEPS, EPOCHS, BATCHES = 3, 2, 8  # the end of an epoch cuts a window off
UPDATES = EPOCHS * -(-BATCHES // STEPS)


def batch(number, index):
    """What a worker has of a batch."""
    rng = np.random.default_rng([number, index])
    return cases.dense().batch(rng, 1 + (number + index) % 4)


def build():
    """The model before it is trained."""
    law = laws.Law()
    return ga.make_accumulating(laws.build(law, law.optimizer), STEPS)


def train(strategy, folder=None, save_freq=None, index=None, dies_at=None, after=0.0):
    """`fit`, with backups in a folder if there is one.

    A worker dies so many seconds after a batch of all epochs, in a backup or in the next batch; or
    at once, before the backup.
    """
    tf_keras.backend.set_floatx("float64")
    task = strategy.cluster_resolver.task_id
    with strategy.scope():
        model = build()
    trained = 0

    def batches():  # `fit` starts anew in the midst of an epoch; its data are to go on there
        number = int(model._train_counter.numpy())
        while True:
            yield batch(number % BATCHES, task)
            number += 1

    def count(*_):
        nonlocal trained
        trained += 1
        if task == index and int(model._train_counter.numpy()) == dies_at:
            if after:
                threading.Timer(after, os.kill, [os.getpid(), signal.SIGKILL]).start()
            else:
                os.kill(os.getpid(), signal.SIGKILL)

    def make(context):
        kinds = cases.dataset([batch(0, 0), batch(1, 0)]).element_spec
        return tf.data.Dataset.from_generator(batches, output_signature=kinds)

    callbacks = [tf_keras.callbacks.LambdaCallback(on_train_batch_end=count)]
    if folder is not None:
        callbacks.append(
            tf_keras.callbacks.BackupAndRestore(
                folder, save_freq=save_freq, delete_checkpoint=False
            )
        )
    data = strategy.distribute_datasets_from_function(make)
    model.fit(data, steps_per_epoch=BATCHES, epochs=EPOCHS, callbacks=callbacks, verbose=0)
    return {**laws.state_of(model), "trained": trained}
