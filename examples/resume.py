"""Kill a training in the middle of a window, start it again, and end with the same bits.

A child process trains with `BackupAndRestore(save_freq=5)`, and is killed by SIGKILL when five of
the eight micro-batches of a window are done (it sends the signal itself, to be killed just there).
Another child goes on from the last backup, the gradients of a begun window included. Its weights
are compared, bit by bit, with those of a training that nobody disturbed.

tf_keras starts the data of an epoch anew. Here they go on where they stopped, which is known of
the model: by its updates, and by the micro-batches that are pending.

    python examples/resume.py --epochs 4

The data are scikit-learn's 1,797 handwritten digits, which come with the package. Windows has no
SIGKILL.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tensorflow as tf
import tf_keras
from sklearn.datasets import load_digits

import ga_transform as ga

ROWS, STEPS, BATCHES = 32, 8, 56  # rows a micro-batch, micro-batches a window and an epoch


def build():
    """A small network, converted, that computes the same bits whenever it is run."""
    tf.config.experimental.enable_op_determinism()
    tf_keras.utils.set_random_seed(0)
    model = tf_keras.Sequential(
        [
            tf_keras.Input([64]),
            tf_keras.layers.Dense(64, activation="relu"),
            tf_keras.layers.Dense(10),
        ]
    )
    model.compile(
        optimizer=tf_keras.optimizers.Adam(3e-3),
        loss=tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return ga.make_accumulating(model, accum_steps=STEPS)


def position(model):
    """How many micro-batches a model has seen: the end of an epoch cuts no window off here."""
    return int(model.optimizer.iterations) * STEPS + model.pending_micro_batches


def dataset(model, epochs):
    """Micro-batches, shuffled anew for each epoch, from the model's position on."""
    digits = load_digits()

    def batches():  # begins when `fit` has restored the model
        for number in range(position(model), epochs * BATCHES):
            epoch, batch = divmod(number, BATCHES)
            order = np.random.default_rng(epoch).permutation(len(digits.target))
            rows = order[batch * ROWS : (batch + 1) * ROWS]
            yield digits.data[rows] / 16.0, digits.target[rows]

    kinds = tf.TensorSpec([None, 64]), tf.TensorSpec([None], tf.int64)
    return tf.data.Dataset.from_generator(batches, output_signature=kinds)


class Watch(tf_keras.callbacks.Callback):
    """Tells where training starts, and kills its process after so many micro-batches."""

    def __init__(self, kill_at):
        super().__init__()
        self.kill_at = kill_at

    def tell(self, what):
        """Print what happens, and where."""
        where, pending = position(self.model), self.model.pending_micro_batches
        print(f"{what} after micro-batch {where}, {pending} of {STEPS} in the window", flush=True)

    def on_train_begin(self, logs=None):
        """Called when a backup has been restored."""
        self.tell("starts")

    def on_train_batch_end(self, batch, logs=None):
        """Called when a backup has been made, if it is time for one."""
        if position(self.model) == self.kill_at:
            self.tell("killed")
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder, epochs, kill_at):
    """Train to the end, from the backup in the folder if there is one, and leave weights there."""
    model = build()
    backup = tf_keras.callbacks.BackupAndRestore(str(folder / "backup"), save_freq=5)
    model.fit(
        dataset(model, epochs),
        steps_per_epoch=BATCHES,
        epochs=epochs,
        callbacks=[backup, Watch(kill_at)],
        verbose=0,
    )
    np.savez(folder / "weights.npz", int(model.optimizer.iterations), *model.get_weights())


def start(folder, epochs, kill_at=0):
    """Train in a child process; 0 kills nobody."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, __file__, "--epochs", str(epochs), "--child", folder, str(kill_at)]
    code = subprocess.run(command, check=False).returncode
    if code != (-signal.SIGKILL if kill_at else 0):
        raise subprocess.CalledProcessError(code, command)


def result(folder):
    """Updates, and the bits of all weights."""
    with np.load(folder / "weights.npz") as file:
        updates, *weights = (file[name] for name in file.files)
    return int(updates), [each.tobytes() for each in weights]


def main():
    """Train undisturbed; train, kill, go on; compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=4, help="epochs of training (default: 4)")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    epochs = arguments.epochs
    if arguments.child:
        folder, kill_at = arguments.child
        train(Path(folder), epochs, int(kill_at))
        return

    with tempfile.TemporaryDirectory() as folder:
        undisturbed, killed = Path(folder) / "undisturbed", Path(folder) / "killed"
        print("Undisturbed:", flush=True)
        start(undisturbed, epochs)
        print("\nKilled, and started again:", flush=True)
        start(killed, epochs, kill_at=epochs * BATCHES // 2 // STEPS * STEPS + 5)
        start(killed, epochs)
        updates, weights = result(undisturbed)
        updates_of_killed, weights_of_killed = result(killed)
    print(f"\nUpdates: {updates} and {updates_of_killed}")
    print(f"Weights are the same bits: {weights == weights_of_killed}")


if __name__ == "__main__":
    main()
