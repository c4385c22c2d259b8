"""Recommend modules to files, with the negatives of a batch of 512 in slices of 4.

Two towers: one embeds what a file imports, the other a module. A row is a file of Python's standard
library and one of its imports, which the file is shown without. The loss is in-batch softmax: its
score is to be the highest among those with the modules of all rows. So rows see each other, and
slices of 4 learn from 3 negatives in place of 511. `whole_batch_loss=True` has all 511.

    python examples/recommender.py --epochs 12

Which file imports what is read from the files of the Python that runs this.
"""

import argparse
import ast
import os
import sysconfig
import warnings
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tensorflow as tf
import tf_keras

import ga_transform as ga

BATCH, SLICE = 512, 4  # rows
warnings.simplefilter("ignore", SyntaxWarning)  # in the files that are read


def imports_of(path):
    """The modules that a file imports."""
    try:
        nodes = list(ast.walk(ast.parse(path.read_bytes())))
    except (SyntaxError, ValueError):  # there are files that test the parser
        return set()
    names = [each.name for node in nodes if isinstance(node, ast.Import) for each in node.names]
    froms = [node for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    return {name.split(".")[0] for name in [*names, *(node.module for node in froms)]}


def load(files):
    """Which file imports which module. Shape: [files, modules], bool; files in random order."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in sorted(root.rglob("*.py")) if "-packages" not in str(path)]
    imported = [imports_of(path) for path in np.random.default_rng(0).permutation(paths)[:files]]
    modules = sorted(set().union(*imported))
    table = np.array([[name in names for name in modules] for names in imported])
    table = table[:, table.sum(0) >= 3]
    return table[table.sum(1) >= 3]


def left_out(table):
    """A row for each import: the other imports of its file, and the module."""
    files, modules = np.nonzero(table)
    others = table[files].astype("float32")
    others[np.arange(len(files)), modules] = 0
    order = np.random.default_rng(0).permutation(len(files))
    return others[order], modules[order]


def in_batch_softmax(log_share):
    """A loss: the row's own module against those of all rows, corrected for how common they are."""

    def loss(module, embeddings):
        module = tf.reshape(tf.cast(module, tf.int32), [-1])
        file_, own = embeddings[:, 0], embeddings[:, 1]
        scores = tf.matmul(file_, own, transpose_b=True) - tf.gather(log_share, module)
        rows = tf.range(tf.shape(scores)[0])
        is_same = (module[:, None] == module) & (rows[:, None] != rows)
        scores -= 1e9 * tf.cast(is_same, scores.dtype)  # the same module is no negative
        return tf.nn.sparse_softmax_cross_entropy_with_logits(rows, scores)

    return loss


def build(log_share):
    """Both towers, whose embeddings are one output, [rows, 2, 32]; compiled as any other."""
    tf_keras.utils.set_random_seed(0)
    layers, modules = tf_keras.layers, len(log_share)
    others, module = tf_keras.Input([modules]), tf_keras.Input([], dtype="int32")
    towers = [layers.Dense(32)(others), layers.Embedding(modules, 32)(module)]
    embeddings = layers.Lambda(lambda both: tf.stack(both, 1))(towers)
    model = tf_keras.Model([others, module], embeddings)
    model.compile(tf_keras.optimizers.Adam(0.01), in_batch_softmax(log_share))
    return model


def recall(model, table):
    """The share of imports that are among the 10 best modules for the others of their file."""
    (others, module), every = left_out(table), np.arange(table.shape[1])
    files, modules = model([others, module])[:, 0], model([np.eye(len(every)), every])[:, 1]
    scores = np.where(others > 0, -np.inf, files @ tf.transpose(modules))
    own = scores[np.arange(len(module)), module]
    return np.mean(np.sum(scores > own[:, np.newaxis], axis=1) < 10)


def main():
    """Train all ways, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=12, help="epochs (default: 12)")
    parser.add_argument("--files", type=int, default=1200, help="files to read (default: 1200)")
    arguments = parser.parse_args()
    table = load(arguments.files)
    table, held_out = np.split(table, [-len(table) // 5])
    others, module = left_out(table)
    log_share = np.log(table.sum(0).clip(1) / table.sum()).astype("float32")
    print(f"{len(table)} files, {len(held_out)} held out, {len(module)} rows")
    print(f"Recall@10 before training: {recall(build(log_share), held_out):.3f}\n")

    ways = {
        "plain, 512": {},
        "slices of 4": {"micro_batch_size": SLICE},
        "slices of 4, whole batch": {"micro_batch_size": SLICE, "whole_batch_loss": True},
    }
    print(f"{'':26}{'updates':>9}{'recall@10':>11}{'largest difference of a weight':>32}")
    reference = None
    for way, how in ways.items():
        model = build(log_share)
        model = ga.make_accumulating(model, **how) if how else model
        model.fit([others, module], module, BATCH, arguments.epochs, verbose=0, shuffle=False)
        weights, updates = model.get_weights(), int(model.optimizer.iterations)
        reference = reference or weights
        difference = max(np.max(np.abs(a - b)) for a, b in zip(weights, reference))
        print(f"{way:26}{updates:9}{recall(model, held_out):11.3f}{difference:32.1e}", flush=True)


if __name__ == "__main__":
    main()
