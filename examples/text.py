"""Train on texts of any length, where a mean over tokens is not the mean of the batches' means.

A network reads the names of Unicode's characters (as "latin small letter a with grave") and
predicts each next word. Names are batched by length, as pipelines do, so that micro-batches of
16 names have between 16 and more than 100 words that count; what `Embedding(mask_zero=True)`
masks does not. Their exact mean weighs each by its words: weights end where batches of 128 names
lead. The mean that weighs micro-batches alike (`weighting="equal"`) leads elsewhere.

    python examples/text.py --epochs 3

The names come with Python, in its module `unicodedata`.
"""

import argparse
import itertools
import os
import unicodedata

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tensorflow as tf
import tf_keras

import ga_transform as ga

ROWS, STEPS = 16, 8  # names a micro-batch, micro-batches an update


def load(names):
    """Lists of numbered words, a name each: 0 is no word, 1 begins a name and ends it."""
    texts = [unicodedata.name(chr(code), "") for code in range(0x20, 0x3000)]
    texts = [text.replace("-", " ").split() for text in texts if text][:names]
    words = sorted({word for text in texts for word in text})
    numbers = {word: 2 + number for number, word in enumerate(words)}
    return [[1, *(numbers[word] for word in text), 1] for text in texts], 2 + len(numbers)


def micro_batches(texts):
    """Micro-batches of names of similar length, in random order."""
    texts = sorted(texts, key=len)
    groups = [texts[start : start + ROWS] for start in range(0, len(texts), ROWS)]
    return [groups[index] for index in np.random.default_rng(0).permutation(len(groups))]


def dataset(batches):
    """Words and next words, padded with 0 to the longest name of each batch."""

    def padded():
        for batch in batches:
            length = max(map(len, batch))
            padding = [[0] * (length - len(text)) for text in batch]
            words = [text[:-1] + zeros for text, zeros in zip(batch, padding)]
            next_words = [text[1:] + zeros for text, zeros in zip(batch, padding)]
            yield np.array(words), np.array(next_words)

    kind = tf.TensorSpec([None, None], tf.int64)
    data = tf.data.Dataset.from_generator(padded, output_signature=(kind, kind))
    options = tf.data.Options()
    options.autotune.enabled = False  # there is nothing to tune, and it is slow to stop
    # Of data of unknown length, plain tf_keras counts one update too many an epoch.
    return data.apply(tf.data.experimental.assert_cardinality(len(batches))).with_options(options)


def build(vocabulary):
    """A small recurrent network, whose loss is a mean over words; compiled as any other."""
    tf_keras.utils.set_random_seed(0)
    model = tf_keras.Sequential(
        [
            tf_keras.layers.Embedding(vocabulary, 32, mask_zero=True),
            tf_keras.layers.GRU(64, return_sequences=True),
            tf_keras.layers.Dense(vocabulary),
        ]
    )
    model.build([None, None])
    model.compile(
        optimizer=tf_keras.optimizers.Adam(0.01),
        loss=tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        weighted_metrics=["accuracy"],
    )
    return model


def main():
    """Train in large batches and in micro-batches, weighed exactly and alike, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=3, help="epochs of training (default: 3)")
    parser.add_argument("--names", type=int, default=2000, help="names to learn (default: 2000)")
    arguments = parser.parse_args()
    texts, vocabulary = load(arguments.names)
    small = micro_batches(texts)
    windows = [small[start : start + STEPS] for start in range(0, len(small), STEPS)]
    large = [list(itertools.chain.from_iterable(window)) for window in windows]
    counts = [sum(len(text) - 1 for text in batch) for batch in small[:STEPS]]
    print(f"{len(texts)} names, {vocabulary - 2} words")
    print(f"Words of the first {STEPS} micro-batches: {', '.join(map(str, counts))}\n")

    def fit(model, batches):
        model.fit(dataset(batches), epochs=arguments.epochs, shuffle=False, verbose=0)
        return model

    exact = ga.make_accumulating(build(vocabulary), STEPS)
    equal = ga.Chain(ga.Accumulate(STEPS, weighting="equal"))
    sliced = ga.make_accumulating(build(vocabulary), micro_batch_size=ROWS)
    models = {
        "plain, 128 names": fit(build(vocabulary), large),
        "8 x 16 names": fit(exact, small),
        "128 names in slices of 16": fit(sliced, large),
        "8 x 16 names, equal": fit(
            ga.make_accumulating(build(vocabulary), transforms=equal), small
        ),
    }
    print(f"{'':27}{'updates':>9}{'accuracy':>10}{'largest difference of a weight':>32}")
    reference = models["plain, 128 names"].get_weights()
    judge = build(vocabulary)  # one model to evaluate all weights, which is traced once
    for name, model in models.items():
        judge.set_weights(model.get_weights())
        _, accuracy = judge.evaluate(dataset(large), verbose=0)
        pairs = zip(model.get_weights(), reference)
        difference = max(np.max(np.abs(ours - theirs)) for ours, theirs in pairs)
        updates = int(model.optimizer.iterations)
        print(f"{name:27}{updates:9}{accuracy:10.4f}{difference:32.1e}")


if __name__ == "__main__":
    main()
