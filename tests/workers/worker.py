"""One worker: a process that runs the jobs which `harness.py` sends, until that closes the pipe."""

import functools
import importlib
import json
import os
import queue
import sys
import threading
import traceback
import warnings
from pathlib import Path

import tensorflow as tf
import tf_keras

import ga_transform as ga
from workers import answers

warnings.filterwarnings("error", category=ga.InexactWarning)
tf.get_logger().setLevel("ERROR")


def listen(orders):
    """Queue what is sent; end with the process that sends, also amid a job."""
    for line in sys.stdin:
        orders.put(json.loads(line))
    os._exit(0)


def run(strategy, order):
    """Run a job as if it were the first."""
    tf_keras.backend.clear_session()
    tf_keras.backend.set_floatx("float32")
    module, function = order["job"].split(".")
    job = getattr(importlib.import_module(f"workers.{module}"), function)
    return job(strategy, **order["arguments"])


def main(folder, index):
    """Answer that this worker is there, then job after job."""
    orders = queue.SimpleQueue()
    threading.Thread(target=listen, args=[orders], daemon=True).start()
    try:
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
        number, job = 0, lambda: strategy.num_replicas_in_sync
        while True:
            answers.write(folder / answers.name_of(number, index), job())
            order = orders.get()
            number, job = number + 1, functools.partial(run, strategy, order)
    finally:  # without waiting for the other workers
        traceback.print_exc()
        os._exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
