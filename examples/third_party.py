"""Convert a model that somebody else wrote: see what is exact, try it, train.

    python examples/third_party.py mobilenet
    pip install "transformers>=4.57,<5" && python examples/third_party.py gpt2

Of MobileNetV2, which comes with tf_keras, the first blocks are taken. They normalise batches,
which couples rows: `explain` names the layers, and "freeze" is exact. GPT-2, of Hugging Face, has
a `compile` and a `train_step` of its own, and a loss that is a mean over the tokens whose label is
not -100: how many there are is told to `Accumulate` by a function of the batch. No weights are
downloaded: MobileNetV2 is trained for a while in the plain way first, GPT-2 is tiny and starts
from random ones.

The data are scikit-learn's handwritten digits, and the names of Unicode's characters, which come
with Python.
"""

import argparse
import os
import sys
import unicodedata

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")  # transformers builds on tf.keras

import numpy as np
import tensorflow as tf
import tf_keras
from sklearn.datasets import load_digits

import ga_transform as ga

STEPS = 4


def mobilenet(rows):
    """An image classifier in the functional API, its chain and its data."""
    digits = load_digits()
    images = np.repeat(np.repeat(digits.images[:rows] / 16.0, 4, axis=1), 4, axis=2)
    x = np.stack([images.astype("float32")] * 3, axis=-1)  # [rows, 32, 32, 3]
    whole = tf_keras.applications.MobileNetV2(
        [32, 32, 3], alpha=0.35, weights=None, include_top=False
    )
    features = whole.get_layer("block_3_expand_relu").output  # enough for small images
    pooled = tf_keras.layers.GlobalAveragePooling2D()(features)
    model = tf_keras.Model(whole.input, tf_keras.layers.Dense(10, activation="softmax")(pooled))
    model.compile(tf_keras.optimizers.Adam(1e-3), "sparse_categorical_crossentropy")
    for layer in model.layers:
        if isinstance(layer, tf_keras.layers.BatchNormalization):
            layer.momentum = 0.9  # made for long training, it is 0.999
    # In place of weights from elsewhere: what is frozen must have statistics of images.
    model.fit(x, digits.target[:rows], batch_size=32, epochs=5, verbose=0)
    return model, ga.Chain(ga.BatchNorm("freeze"), ga.Accumulate(STEPS)), x, digits.target[:rows]


def labelled_tokens(batch):
    """By what GPT-2's loss divides: it predicts each token but the first from those before."""
    _, labels = batch
    return tf.math.count_nonzero(labels[:, 1:] != -100)


def gpt2(rows):
    """A language model with a `train_step` of its own, its chain and its data: letters of names."""
    try:
        from transformers import GPT2Config, TFGPT2LMHeadModel
    except ImportError:
        sys.exit('gpt2 needs transformers: pip install "transformers>=4.57,<5"')
    names = [unicodedata.name(chr(code), "") for code in range(0x20, 0x3000)]
    names = [name.encode() for name in names if name][:rows]
    length = max(map(len, names))
    letters = np.array([list(name.ljust(length, b"\0")) for name in names], "int32")
    inputs = {"input_ids": letters, "attention_mask": np.array(letters != 0, "int32")}
    config = GPT2Config(
        vocab_size=128, n_positions=length, n_embd=32, n_layer=2, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = TFGPT2LMHeadModel(config)
    model.compile(tf_keras.optimizers.Adam(0.003))  # the loss is the model's own
    model.build_in_name_scope()
    chain = ga.Chain(ga.Accumulate(STEPS, weighting=labelled_tokens))
    return model, chain, inputs, np.where(letters != 0, letters, -100)


def main():
    """Convert in place, explain, verify, train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    models = {"mobilenet": mobilenet, "gpt2": gpt2}
    parser.add_argument("model", nargs="?", choices=models, default="mobilenet")
    parser.add_argument("--epochs", type=int, default=3, help="epochs of training (default: 3)")
    parser.add_argument("--rows", type=int, default=512, help="rows of data (default: 512)")
    arguments = parser.parse_args()
    tf_keras.utils.set_random_seed(0)

    model, chain, x, y = models[arguments.model](arguments.rows)
    of_class = type(model)
    model = ga.make_accumulating(model, transforms=chain, inplace=True)
    print(f"A {of_class.__name__} still: {isinstance(model, of_class)}\n\n{ga.explain(model)}\n")

    some_x, some_y = tf.nest.map_structure(lambda part: part[: STEPS * 8], (x, y))
    report = ga.verify_equivalence(model, some_x, some_y, updates=2)
    print(f"Largest relative difference from large batches: {report.largest:.1e}\n")

    before = int(model.optimizer.iterations)
    history = model.fit(x, y, batch_size=16, epochs=arguments.epochs, verbose=0).history
    losses = ", ".join(f"{loss:.3f}" for loss in history["loss"])
    print(f"{int(model.optimizer.iterations) - before} updates, loss by epoch: {losses}")


if __name__ == "__main__":
    main()
