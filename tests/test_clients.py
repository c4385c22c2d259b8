"""Models of other packages, where these are installed: converted, trained, compared, saved."""

import os

# Most of them are built on `tf.keras`, which has to be tf_keras: before it is looked at.
os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")

import cases
import numpy as np
import own_models
import pytest
import tensorflow as tf
import tf_keras

import ga_transform as ga

applications = tf_keras.applications


def client(name):
    """Another package, if it is here and builds on tf_keras."""
    package = pytest.importorskip(name)
    if tf.keras.Model is not tf_keras.Model:
        pytest.skip(f"{name} builds on tf.keras: set TF_USE_LEGACY_KERAS=1 to have it on tf_keras")
    return package


def assert_law(build, batches, tolerance, callbacks=tuple):
    """In place: the weights, updates and log keys of a plain twin on the concatenated windows.

    Returns:
        The converted model, and the plain one.
    """
    plain, model = build(), build()
    model.set_weights(plain.get_weights())
    start = cases.weights_of(plain)
    ga.make_accumulating(model, cases.STEPS, inplace=True)
    theirs = plain.fit(
        cases.dataset(map(cases.concatenate, batches)), epochs=2, verbose=0, callbacks=callbacks()
    )
    ours = model.fit(cases.dataset(sum(batches, [])), epochs=2, verbose=0, callbacks=callbacks())
    cases.assert_same_weights(model, plain, start, tolerance)
    assert int(model.optimizer.iterations) == int(plain.optimizer.iterations)
    assert list(ours.history) == list(theirs.history)
    return model, plain


def regression(rng, rows):
    x, y = own_models.regression(rng, rows)
    return x.astype("float32"), y.astype("float32")


# ---- tf_keras ------------------------------------------------------------------------------


def without_noise(model):
    """Batch norm as it is at inference, no dropout: what is left is within the law."""
    for layer in model._flatten_layers():
        if isinstance(layer, tf_keras.layers.BatchNormalization):
            layer.trainable = False
        if isinstance(layer, tf_keras.layers.Dropout):
            layer.rate = 0.0
    return model


@pytest.mark.long
@pytest.mark.parametrize(
    ("build", "file"),
    [
        (applications.MobileNetV2, "model.keras"),
        (applications.EfficientNetB0, "model.h5"),
    ],
)
def test_applications(float64, tmp_path, build, file):
    """tf_keras's own networks: the law, and their file."""
    model = without_noise(build(weights=None, input_shape=[32, 32, 3], classes=4))
    case = cases.Case(
        model,
        {"loss": "sparse_categorical_crossentropy", "metrics": ["accuracy"]},
        lambda rng, rows: (rng.normal(size=[rows, 32, 32, 3]), rng.integers(0, 4, size=[rows])),
    )
    converted = cases.assert_law(
        case, lambda: tf_keras.optimizers.SGD(0.01), [[2, 1]], 1e-9, epochs=1
    )
    converted.save(tmp_path / file)
    loaded = tf_keras.models.load_model(tmp_path / file)
    assert loaded.transforms == converted.transforms
    for ours, theirs in zip(loaded.get_weights(), converted.get_weights()):
        np.testing.assert_array_equal(ours, theirs)


# ---- recommenders --------------------------------------------------------------------------


def ratings(rng, rows):
    return {
        "user": rng.integers(0, 20, rows),
        "item": rng.integers(0, 30, rows),
        "rating": rng.normal(size=[rows, 1]),
    }


def recommender(optimizer, task):
    tfrs = client("tensorflow_recommenders")

    class Recommender(tfrs.Model):
        def __init__(self):
            super().__init__()
            self.user = tf_keras.layers.Embedding(20, 4, embeddings_regularizer="l2")
            self.item = tf_keras.layers.Embedding(30, 4)
            self.score = tf_keras.Sequential([own_models.dense(8, "tanh"), own_models.dense(1)])
            self.task = task(tfrs)

        def call(self, batch):
            return self.score(tf.concat([self.user(batch["user"]), self.item(batch["item"])], -1))

        def compute_loss(self, batch, training=False):
            if isinstance(self.task, tfrs.tasks.Retrieval):
                return self.task(self.user(batch["user"]), self.item(batch["item"]))
            return self.task(labels=batch["rating"], predictions=self(batch))

    model = Recommender()
    model(ratings(np.random.default_rng(0), 2))
    model.compile(optimizer(model))
    return model


def ranking(tfrs):
    metrics = [tf_keras.metrics.RootMeanSquaredError()]
    return tfrs.tasks.Ranking(loss=tf_keras.losses.MeanSquaredError(), metrics=metrics)


def composite(model):
    """One optimizer for the embeddings, another for the network."""
    optimizers = tf_keras.optimizers
    return client("tensorflow_recommenders").experimental.optimizers.CompositeOptimizer(
        [
            (optimizers.Adagrad(0.1), lambda: [*model.user.weights, *model.item.weights]),
            (optimizers.Adam(0.01), lambda: model.score.weights),
        ]
    )


@pytest.mark.parametrize(
    "optimizer", [lambda _: tf_keras.optimizers.Adam(0.01), composite], ids=["adam", "composite"]
)
def test_recommenders(float64, tmp_path, optimizer):
    """A `compute_loss` of the whole batch, its own `train_step`, a composite optimizer."""
    model, plain = assert_law(
        lambda: recommender(optimizer, ranking), cases.batches_of(ratings, cases.PARTIAL), 1e-9
    )
    model.save_weights(tmp_path / "weights")
    plain.set_weights([weight + 1 for weight in plain.get_weights()])
    plain.load_weights(tmp_path / "weights").expect_partial()
    batch = ratings(np.random.default_rng(1), 3)
    np.testing.assert_array_equal(plain(batch), model(batch))


def test_retrieval_is_named():
    """In-batch negatives couple rows: a warning names the task."""
    model = recommender(lambda _: "sgd", lambda tfrs: tfrs.tasks.Retrieval())
    with pytest.warns(ga.InexactWarning, match="Retrieval of tensorflow_recommenders couples"):
        ga.make_accumulating(model, 2, inplace=True)


# ---- probability ---------------------------------------------------------------------------


def test_probability(float64, tmp_path):
    """A distribution as the output, its likelihood as the loss; also as a copy, and saved."""
    tfp = client("tensorflow_probability")
    normal = tfp.distributions.Normal
    likelihood = lambda y, distribution: -distribution.log_prob(y)  # noqa: E731

    def build():
        layers = tf_keras.layers
        to_normal = lambda t: normal(t[..., :2], 1e-3 + tf.nn.softplus(t[..., 2:]))  # noqa: E731
        model = tf_keras.Sequential(
            [
                tf_keras.Input([4]),
                layers.Dense(8, "tanh"),
                layers.Dense(4),
                tfp.layers.DistributionLambda(to_normal),
            ]
        )
        model.compile(tf_keras.optimizers.Adam(0.01), likelihood)
        return model

    model, plain = assert_law(build, cases.batches_of(own_models.regression, cases.PARTIAL), 1e-9)
    copy = ga.make_accumulating(plain, accum_steps=1)
    x, y = own_models.regression(np.random.default_rng(1), 5)
    for each in (plain, copy):
        each.train_on_batch(x, y)
    for ours, theirs in zip(copy.get_weights(), plain.get_weights()):
        np.testing.assert_allclose(ours, theirs, atol=1e-9)
    model.save(tmp_path / "model.h5")
    loaded = tf_keras.models.load_model(
        tmp_path / "model.h5", custom_objects={"<lambda>": likelihood}
    )
    np.testing.assert_allclose(loaded(x).mean(), model(x).mean(), atol=1e-9)


# ---- pruning -------------------------------------------------------------------------------


def test_pruning(tmp_path):
    """Sparsity grows with the updates: the masks, the weights and the step of the large batch."""
    sparsity = client("tensorflow_model_optimization").sparsity.keras

    def build():
        model = tf_keras.Sequential(
            [tf_keras.Input([4]), own_models.dense(12, "tanh"), own_models.dense(2)]
        )
        model = sparsity.prune_low_magnitude(
            model, sparsity.PolynomialDecay(0.0, 0.75, begin_step=1, end_step=4, frequency=1)
        )
        model.compile(own_models.momentum(), "mse")
        return model

    model, plain = assert_law(
        build,
        cases.batches_of(regression, cases.PARTIAL),
        1e-4,
        callbacks=lambda: [sparsity.UpdatePruningStep()],
    )
    steps = [int(each.layers[0].pruning_step) for each in (model, plain)]
    assert steps == [4, 4]
    kernel = model.layers[0].layer.kernel
    assert np.mean(kernel.numpy() == 0) == pytest.approx(0.75, abs=0.03)
    with sparsity.prune_scope():
        model.save(tmp_path / "model.h5")
        loaded = tf_keras.models.load_model(tmp_path / "model.h5")
    assert loaded.transforms == model.transforms
    stripped = sparsity.strip_pruning(ga.strip_accumulating(model, inplace=True))
    x = np.ones([2, 4])
    np.testing.assert_allclose(stripped(x), model(x), atol=1e-6)


# ---- graphs --------------------------------------------------------------------------------


def graphs(count):
    spektral = client("spektral")

    class Graphs(spektral.data.Dataset):
        def read(self):
            rng = np.random.default_rng(3)
            found = []
            for _ in range(count):
                nodes = rng.integers(4, 9)
                edges = (rng.random([nodes, nodes]) < 0.4).astype("float32")
                x = rng.normal(size=[nodes, 3]).astype("float32")
                y = rng.normal(size=[1]).astype("float32")
                found.append(spektral.data.Graph(x=x, a=np.maximum(edges, edges.T), y=y))
            return found

    return Graphs()


def graph_network(own_step):
    spektral = client("spektral")

    class Network(tf_keras.Model):
        def __init__(self):
            super().__init__()
            start = tf_keras.initializers.GlorotUniform(3)
            self.conv = spektral.layers.GCSConv(8, "tanh", kernel_initializer=start)
            self.pool = spektral.layers.GlobalSumPool()
            self.top = own_models.dense(1)

        def call(self, inputs):
            x, a, i = inputs
            return self.top(self.pool([self.conv([x, a]), i]))

    class Stepping(Network):
        def train_step(self, data):
            inputs, y = data
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((self(inputs, training=True) - y) ** 2)
            self.optimizer.minimize(loss, self.trainable_variables, tape=tape)
            return {"loss": loss}

    return Stepping() if own_step else Network()


@pytest.mark.parametrize("own_step", [False, True])
def test_graphs(own_step):
    """Graphs joined into one, of differing numbers of nodes: a mean over graphs."""
    data, loader = graphs(14), client("spektral").data.DisjointLoader
    models = []
    for batch_size, steps in ((6, None), (2, 3)):
        model = graph_network(own_step)
        model.compile(tf_keras.optimizers.SGD(0.003, momentum=0.9), "mse")
        model(next(iter(loader(data, batch_size=2, shuffle=False).load()))[0])
        start = cases.weights_of(model)
        if steps:
            ga.make_accumulating(model, steps, inplace=True)
        batches = loader(data, batch_size=batch_size, shuffle=False)
        model.fit(batches.load(), steps_per_epoch=batches.steps_per_epoch, epochs=2, verbose=0)
        models.append(model)
    plain, model = models
    assert int(model.optimizer.iterations) == int(plain.optimizer.iterations) == 6
    cases.assert_same_weights(model, plain, start, 1e-4)
