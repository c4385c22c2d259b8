"""Models of Hugging Face `transformers`: their own train_step and compile, converted in place."""

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any

import cases
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import ga_transform as ga
from ga_transform.errors import InexactWarning

hf = pytest.importorskip("transformers")
pytest.importorskip("transformers.modeling_tf_utils")  # transformers 5 has no TensorFlow models
hf.logging.set_verbosity_error()

pytestmark = pytest.mark.filterwarnings("default:`seed_generator` is deprecated:UserWarning")

VOCABULARY, LENGTH, CLASSES, IGNORED = 23, 6, 3, -100
TINY = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": CLASSES,
}
TEXT = {**TINY, "vocab_size": VOCABULARY, "max_position_embeddings": LENGTH}
IMAGE = {**TINY, "image_size": 8, "patch_size": 4}


@dataclasses.dataclass
class Client:
    build: Callable[[], Any]
    inputs: Callable[[np.random.Generator, int], dict[str, np.ndarray]]
    labels: Callable[[np.random.Generator, int], np.ndarray]
    #: Positions of the labels, from which on the model's own loss counts; None counts rows.
    counted_from: Any = None
    tolerance: float = 1e-9

    def batch(self, rng, rows):
        return self.inputs(rng, rows), self.labels(rng, rows)


def words(rng, rows, length=LENGTH):
    return rng.integers(3, VOCABULARY, size=[rows, length]).astype("int32")


def images(rng, rows):
    return {"pixel_values": rng.normal(size=[rows, 3, 8, 8]).astype(tf_keras.backend.floatx())}


def padded(labels, rng):
    kept = rng.integers(2, LENGTH + 1, size=[len(labels), 1])
    return np.where(np.arange(LENGTH) < kept, labels, IGNORED)


CLIENTS = {
    "bert classifies": Client(
        lambda: hf.TFBertForSequenceClassification(hf.BertConfig(**TEXT)),
        lambda rng, rows: {"input_ids": words(rng, rows)},
        lambda rng, rows: rng.integers(0, CLASSES, size=[rows]),
    ),
    "bert tags": Client(
        lambda: hf.TFBertForTokenClassification(hf.BertConfig(**TEXT)),
        lambda rng, rows: {"input_ids": words(rng, rows)},
        lambda rng, rows: padded(rng.integers(0, CLASSES, size=[rows, LENGTH]), rng),
        counted_from=0,
    ),
    "gpt2": Client(
        lambda: hf.TFGPT2LMHeadModel(
            hf.GPT2Config(
                vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=8, n_layer=1, n_head=2,
                resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2,
            )
        ),
        lambda rng, rows: {"input_ids": words(rng, rows)},
        lambda rng, rows: padded(words(rng, rows), rng),
        counted_from=1,  # a causal model predicts the next token
    ),
    "t5": Client(
        lambda: hf.TFT5ForConditionalGeneration(
            hf.T5Config(
                vocab_size=VOCABULARY, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2,
                dropout_rate=0.0, decoder_start_token_id=0,
            )
        ),
        lambda rng, rows: {"input_ids": words(rng, rows), "decoder_input_ids": words(rng, rows)},
        lambda rng, rows: padded(words(rng, rows), rng),
        counted_from=0,
        tolerance=1e-6,  # T5 takes its logits in float32
    ),
    "vit": Client(
        lambda: hf.TFViTForImageClassification(hf.ViTConfig(**IMAGE)),
        images,
        lambda rng, rows: rng.integers(0, CLASSES, size=[rows]),
    ),
}  # fmt: skip
#: Traced; the others run eagerly, because tracing them takes the time of all their steps.
IN_GRAPHS = ("bert classifies", "gpt2")


def build(client, seed=3):
    tf_keras.utils.set_random_seed(seed)
    model = client.build()
    model.build_in_name_scope()
    return model


def pair(client, **compile_arguments):
    """Two models with the same weights, compiled alike."""
    models = build(client), build(client)
    for model in models:
        optimizer = compile_arguments.get("optimizer", lambda: tf_keras.optimizers.Adam(0.01))()
        model.compile(**{**compile_arguments, "optimizer": optimizer})
    models[1].set_weights(models[0].get_weights())
    return models


def with_labels(batch):
    """A batch for the model's own loss, which takes the labels as an input."""
    inputs, labels = batch
    return ({**inputs, "labels": labels},)


def counter(client):
    """The function of a batch that counts what the model's own loss is a mean of."""

    def count(batch):
        labels = tf_keras.utils.unpack_x_y_sample_weight(batch)[0]["labels"]
        return tf.math.count_nonzero(labels[:, client.counted_from :] != IGNORED)

    return count


def count_rows(batch):
    return tf.shape(tf.nest.flatten(batch)[0])[0]


def assert_law(models, windows, tolerance, **accumulate):
    """The first model in windows against the second on the concatenation of each."""
    model, plain = models
    start = cases.weights_of(plain)
    chain = [ga.Accumulate(cases.STEPS, **accumulate)]
    assert ga.make_accumulating(model, transforms=chain, inplace=True) is model
    ours = model.fit(cases.dataset(sum(windows, [])), epochs=2, verbose=0)
    theirs = plain.fit(cases.dataset(map(cases.concatenate, windows)), epochs=2, verbose=0)
    cases.assert_same_weights(model, plain, start, tolerance)
    updates = [int(each.optimizer.iterations) for each in models]
    assert updates == [2 * len(windows)] * 2
    assert list(ours.history) == list(theirs.history)


# ---- training ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLIENTS)
def test_the_loss_of_the_model_itself(float64, name):
    """With the model's own loss, weighed by what it is a mean of, the weights of the large batch."""
    client = CLIENTS[name]
    weighting = {} if client.counted_from is None else {"weighting": counter(client)}
    windows = [[with_labels(b) for b in w] for w in cases.make_batches(client, cases.PARTIAL)]
    models = pair(client, run_eagerly=name not in IN_GRAPHS)
    assert_law(models, windows, client.tolerance, **weighting)


@pytest.mark.parametrize("name", CLIENTS)
def test_a_loss_given_to_compile(float64, name):
    """With a loss of tf_keras, also one that ignores labels, nothing need be counted."""
    client = CLIENTS[name]
    ignored = {} if client.counted_from is None else {"ignore_class": IGNORED}
    loss = tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True, **ignored)
    models = pair(client, loss=loss, metrics=["accuracy"], run_eagerly=True)
    assert_law(models, cases.make_batches(client, cases.UNEVEN), client.tolerance)


@pytest.mark.filterwarnings("ignore::ga_transform.InexactWarning")
def test_a_loss_that_is_one_number_weighs_rows(float64):
    """Where a model's own loss is one number a batch and nothing counts, its rows do."""
    client = CLIENTS["bert tags"]
    batches = [with_labels(b) for b in cases.make_batches(client, cases.UNEVEN)[0]]
    models = pair(client, run_eagerly=True)
    start = cases.weights_of(models[0])
    for model, weighting in zip(models, ("exact", count_rows)):
        chain = [ga.Accumulate(cases.STEPS, weighting=weighting)]
        ga.make_accumulating(model, transforms=chain, inplace=True)
        model.fit(cases.dataset(batches), verbose=0)
    cases.assert_same_weights(*models, start, 1e-9)


def clip():
    text = {**TEXT, "attention_dropout": 0.0, "eos_token_id": 2}
    vision = {**IMAGE, "attention_dropout": 0.0}
    config = hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=6)
    return Client(
        lambda: hf.TFCLIPModel(config),
        lambda rng, rows: {"input_ids": words(rng, rows), **images(rng, rows)},
        lambda rng, rows: None,
    )


def test_a_loss_that_is_one_number_is_said_to_be_inexact():
    """A mean over tokens is no mean over rows: a warning says what to say."""
    client = CLIENTS["bert tags"]
    model = build(client)
    model.compile("adam", run_eagerly=True)
    ga.make_accumulating(model, 2, inplace=True)
    with pytest.warns(InexactWarning, match="as one number, which is read as a mean over rows"):
        model.train_on_batch(*with_labels(client.batch(np.random.default_rng(0), 4)))


def test_a_contrastive_model_is_named():
    """CLIP compares every row with every other: a warning names it at conversion."""
    model = build(clip())
    model.compile("adam", run_eagerly=True)
    with pytest.warns(InexactWarning, match="TFCLIPModel of transformers couples the rows"):
        ga.make_accumulating(model, 2, inplace=True)


@pytest.mark.parametrize("name", ["bert tags", "gpt2"])
def test_a_micro_batch_without_a_valid_token(float64, name):
    """A micro-batch that weighs nothing adds nothing, though its own mean is 0 / 0."""
    client = CLIENTS[name]
    windows = cases.make_batches(client, cases.UNEVEN)
    for window, empty in zip(windows, (1, 0)):
        window[empty][1][:] = IGNORED
    windows = [[with_labels(batch) for batch in window] for window in windows]
    models = pair(client, run_eagerly=True)
    assert_law(models, windows, client.tolerance, weighting=counter(client))


def test_the_optimizer_of_transformers():
    """Its warm-up and weight decay see updates and nothing else."""
    client = CLIENTS["bert classifies"]
    windows = [[with_labels(b) for b in w] for w in cases.make_batches(client, cases.PARTIAL)]

    def adam():
        return hf.create_optimizer(0.01, 6, 2, weight_decay_rate=0.01)[0]

    assert_law(pair(client, optimizer=adam), windows, 1e-4)


def test_inside_a_functional_model(float64):
    """A functional model around one of transformers is copied, and holds the law."""
    inputs = tf_keras.Input([LENGTH], dtype="int32")
    hidden = hf.TFBertModel(hf.BertConfig(**TEXT))(inputs).pooler_output
    case = cases.Case(
        tf_keras.Model(inputs, tf_keras.layers.Dense(CLASSES)(hidden)),
        {"loss": tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True)},
        lambda rng, rows: (words(rng, rows), rng.integers(0, CLASSES, size=[rows])),
    )
    cases.assert_law(case, cases.OPTIMIZERS["adam"], cases.PARTIAL, 1e-9)


# ---- saving, copying and the way back ------------------------------------------------------


@functools.lru_cache
def trained(name):
    """A converted model and a plain one with the same weights, both trained, and a batch."""
    client = CLIENTS[name]
    batch = with_labels(client.batch(np.random.default_rng(0), 4))[0]
    model, plain = pair(client, run_eagerly=True)
    ga.make_accumulating(model, 1, inplace=True)
    for each in (model, plain):
        each.train_on_batch(batch)
    plain.set_weights(model.get_weights())
    return model, plain, batch


def assert_equal_weights(one, other):
    tf.nest.map_structure(np.testing.assert_array_equal, one.get_weights(), other.get_weights())


@pytest.mark.parametrize("safe", [False, True], ids=["h5", "safetensors"])
@pytest.mark.parametrize("name", ["bert classifies", "t5"])
def test_save_pretrained_writes_what_the_plain_model_writes(tmp_path, name, safe):
    """The same files, the same config.json; the plain class loads the weights back."""
    model, plain, _ = trained(name)
    for each, folder in ((model, "ours"), (plain, "theirs")):
        each.save_pretrained(tmp_path / folder, safe_serialization=safe)
    ours, theirs = (
        {path.name for path in (tmp_path / folder).iterdir()} for folder in ("ours", "theirs")
    )
    assert ours == theirs
    assert_equal_weights(type(plain).from_pretrained(tmp_path / "ours"), model)
    ours, theirs = (
        json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("ours", "theirs")
    )
    assert ours == theirs


@pytest.mark.parametrize("name", ["bert classifies", "gpt2"])
def test_the_class_of_a_converted_model_makes_models_that_train(tmp_path, name):
    """`type(model).from_pretrained`, `from_config` and `clone_model` work as for the plain class."""
    model, _, batch = trained(name)
    model.save_pretrained(tmp_path)
    makers = (
        lambda: type(model).from_pretrained(tmp_path),
        lambda: type(model).from_config(model.get_config()),
        lambda: tf_keras.models.clone_model(model),
    )
    for make in makers:
        other = make()
        other.compile("adam", run_eagerly=True)
        other.test_on_batch(batch)  # builds what has no weights yet
        before = other.get_weights()
        other.train_on_batch(batch)
        assert int(other.optimizer.iterations) == 1
        assert any(np.any(old != new) for old, new in zip(before, other.get_weights()))


@pytest.mark.parametrize("file", ["w.h5", "w.weights.h5", "checkpoint"])
@pytest.mark.parametrize("name", ["bert classifies", "gpt2"])
def test_weights_move_to_and_from_the_plain_model(tmp_path, name, file):
    """Weight files fit both ways."""
    model, plain, _ = trained(name)
    for one, other in ((model, plain), (plain, model)):
        one.set_weights([weight + 1 for weight in one.get_weights()])
        one.save_weights(str(tmp_path / file))
        status = other.load_weights(str(tmp_path / file))
        if status is not None:
            status.expect_partial()
        assert_equal_weights(one, other)


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_generate(name):
    """A converted model generates what the plain one generates."""
    model, plain, batch = trained(name)
    ours, theirs = (
        each.generate(batch["input_ids"][:1, :3], max_new_tokens=2, do_sample=False)
        for each in (model, plain)
    )
    np.testing.assert_array_equal(ours, theirs)


def test_a_model_is_copied(float64):
    """Compiled and trained, it is copied with its optimizer's state, and goes on alike."""
    client = CLIENTS["bert classifies"]
    model = build(client)
    model.compile(tf_keras.optimizers.Adam(0.01), run_eagerly=True)
    first, second = (with_labels(client.batch(np.random.default_rng(i), 4))[0] for i in (0, 1))
    model.train_on_batch(first)
    copy = ga.make_accumulating(model, accum_steps=1)
    for each in (model, copy):
        each.train_on_batch(second)
    for ours, theirs in zip(copy.get_weights(), model.get_weights()):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["bert classifies", "gpt2"])
def test_the_way_back(float64, tmp_path, name):
    """Stripped in place, a model has its own class, and its name in config.json, again."""
    model, plain = pair(CLIENTS[name])
    ga.make_accumulating(model, 2, inplace=True)
    model.save_pretrained(tmp_path)  # leaves its mark in the config
    assert ga.strip_accumulating(model, inplace=True) is model
    assert type(model) is type(plain)
    model.save_pretrained(tmp_path)
    architectures = json.loads((tmp_path / "config.json").read_text())["architectures"]
    assert architectures == [type(plain).__name__[len("TF") :]]
