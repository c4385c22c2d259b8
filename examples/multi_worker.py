"""Train on two workers, in micro-batches of 32, as if one process had batches of 256.

Starts two processes on this machine, each a worker of a `MultiWorkerMirroredStrategy`, and
compares their weights with those of plain tf_keras in one process. What a worker does is `train`:
where a cluster manager sets TF_CONFIG, this script does no more than that.

The data are scikit-learn's 1,797 handwritten digits, which come with the package.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tensorflow as tf
import tf_keras
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import ga_transform as ga

WORKERS, SECONDS = 2, 600


def load():
    """Images in [0, 1], [rows, 8, 8, 1], and labels, split for training and testing."""
    digits = load_digits()
    images = (digits.images / 16.0).astype("float32")[..., np.newaxis]
    return train_test_split(images, digits.target, test_size=360, random_state=0)


def build():
    """A small convolutional network, compiled as any other."""
    tf_keras.utils.set_random_seed(0)
    model = tf_keras.Sequential(
        [
            tf_keras.Input([8, 8, 1]),
            tf_keras.layers.Conv2D(32, 3, activation="relu", kernel_regularizer="l2"),
            tf_keras.layers.Flatten(),
            tf_keras.layers.Dense(64, activation="relu"),
            tf_keras.layers.Dense(10),
        ]
    )
    model.compile(
        optimizer=tf_keras.optimizers.Adam(1e-3),
        loss=tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def train(epochs, folder):
    """What each worker does. Of every 32 rows it takes its share; 8 times 32 make an update."""
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    with strategy.scope():
        model = ga.make_accumulating(build(), accum_steps=8)
    train_x, _, train_y, _ = load()
    traffic = Traffic()
    task = strategy.cluster_resolver.task_id
    model.fit(
        train_x,
        train_y,
        batch_size=32,
        epochs=epochs,
        shuffle=False,
        callbacks=[traffic],
        verbose=2 if task == 0 else 0,
    )
    np.savez(Path(folder) / f"weights-{task}.npz", *model.get_weights())
    if task == 0:
        traffic.tell(model)


class Traffic(tf_keras.callbacks.Callback):
    """Notes how many bytes each batch sends through this machine, to itself."""

    def __init__(self):
        super().__init__()
        self.of_micro_steps, self.of_updates = [], []

    def on_train_batch_begin(self, batch, logs=None):
        """Start."""
        self._before = bytes_received()

    def on_train_batch_end(self, batch, logs=None):
        """Stop."""
        notes = self.of_micro_steps if self.model.pending_micro_batches else self.of_updates
        notes.append(bytes_received() - self._before)

    def tell(self, model):
        """Print it."""
        gradients = sum(weight.numpy().nbytes for weight in model.trainable_weights)
        print(f"\nGradients are {gradients:,} bytes. Bytes between the workers, median of batches:")
        print(f"without an update{np.median(self.of_micro_steps):14,.0f}")
        print(f"with an update{np.median(self.of_updates):17,.0f}", flush=True)


def bytes_received():
    """What has come over the loopback interface, which Linux counts; elsewhere 0."""
    counts = Path("/proc/net/dev")
    lines = counts.read_text().splitlines() if counts.exists() else []
    return sum(int(line.split()[1]) for line in lines if line.split()[0] == "lo:")


def start_workers(epochs, folder):
    """Start this script for each worker, on the CPU, as a cluster manager would."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(WORKERS)]
    addresses = [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
    for each in sockets:
        each.close()
    processes = []
    for index in range(WORKERS):
        task = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
        with (folder / f"log-{index}.txt").open("w") as log:
            processes.append(
                subprocess.Popen(
                    [sys.executable, __file__, "--epochs", str(epochs), "--folder", folder],
                    env={**os.environ, "TF_CONFIG": json.dumps(task), "CUDA_VISIBLE_DEVICES": "-1"},
                    stderr=log,
                )
            )
    return processes


def run_workers(epochs, folder):
    """Wait for the workers to end; the weights of each."""
    processes = start_workers(epochs, folder)
    try:
        for index, process in enumerate(processes):
            if process.wait(SECONDS):
                sys.exit(f"worker {index}: {(folder / f'log-{index}.txt').read_text()[-3000:]}")
    finally:
        for process in processes:
            process.kill()
    weights = []
    for index in range(WORKERS):
        with np.load(folder / f"weights-{index}.npz") as file:
            weights.append([file[name] for name in file.files])
    return weights


def main():
    """Train on two workers and on none, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5, help="epochs of training (default: 5)")
    parser.add_argument("--folder", default=".", help="where a worker writes its weights")
    arguments = parser.parse_args()
    if "TF_CONFIG" in os.environ:
        train(arguments.epochs, arguments.folder)
        return

    print(f"{WORKERS} workers, micro-batches of 32, an update every 8:", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        of_workers = run_workers(arguments.epochs, Path(folder))

    print("\nPlain tf_keras in one process, batches of 256:")
    plain = build()
    train_x, _, train_y, _ = load()
    plain.fit(train_x, train_y, batch_size=256, epochs=arguments.epochs, shuffle=False, verbose=2)

    print("\nLargest difference from the weights of one process, relative to the largest weight:")
    for index, weights in enumerate(of_workers):
        pairs = zip(weights, plain.get_weights())
        difference = max(np.abs(ours - one).max() / np.abs(one).max() for ours, one in pairs)
        print(f"worker {index}{difference:10.1e}")


if __name__ == "__main__":
    main()
