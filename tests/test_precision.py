"""Precision: which layers compute in what, and float16's loss scale."""

import warnings

import cases
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from tf_keras import layers

import ga_transform as ga
from ga_transform.models import AccumulatingModel

HALF = ["mixed_float16", "mixed_bfloat16"]
LossScaleOptimizer = tf_keras.mixed_precision.LossScaleOptimizer


def images(dtypes=None):
    """Two convolutions, one nested and followed by batch norm, a wrapper, an op, a head.

    Args:
        dtypes: By name, the policies of layers; the others are float32.
    """

    def named(kind, name, **kwargs):
        return kind(name=name, dtype=(dtypes or {}).get(name, "float32"), **kwargs)

    inputs = tf_keras.Input([6, 6, 2])
    hidden = named(layers.Conv2D, "conv", filters=3, kernel_size=3, kernel_regularizer="l2")(inputs)
    block = tf_keras.Sequential(
        [
            tf_keras.Input([4, 4, 3]),
            named(layers.DepthwiseConv2D, "depthwise", kernel_size=2, padding="same"),
            named(layers.BatchNormalization, "norm"),
        ],
        name="block",
    )
    added = tf_keras.layers.Add(name="add", dtype=(dtypes or {}).get("add", "float32"))
    hidden = added([block(hidden), hidden])
    hidden = named(layers.Reshape, "rows", target_shape=[16, 3])(hidden)
    inner = named(layers.Dense, "inner", units=4, activation="tanh")
    hidden = named(layers.TimeDistributed, "each", layer=inner)(hidden)
    hidden = named(layers.LSTM, "lstm", units=4)(hidden)
    outputs = named(layers.Dense, "head", units=3)(hidden)
    return tf_keras.Model(inputs, outputs)


#: Those of its layers that take a 16-bit policy.
SAFE = ("conv", "depthwise", "norm", "add", "rows", "inner", "each", "lstm")


def batch(rng, rows):
    return (
        rng.normal(size=[rows, 6, 6, 2]).astype("float32"),
        rng.normal(size=[rows, 3]).astype("float32"),
    )


def small(optimizer="sgd", **kwargs):
    model = tf_keras.Sequential(
        [tf_keras.Input([4]), layers.Dense(5, "tanh", name="hidden"), layers.Dense(1, name="head")]
    )
    model.compile(optimizer, "mse", **kwargs)
    return model


def rows(count=12, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=[count, 4]).astype("float32"), rng.normal(size=[count, 1])


def policies(model):
    """By name, the layers that compute, with their policies."""
    return {
        layer.name: layer.dtype_policy.name
        for layer in model.submodules
        if isinstance(layer, layers.Layer) and layer.name in (*SAFE, "head")
    }


def converted(model, **kwargs):
    """As `make_accumulating`, without the warning of batch norm, where that is no matter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ga.InexactWarning)
        return ga.make_accumulating(model, **kwargs)


# ---- which layers --------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
@pytest.mark.parametrize("policy", HALF)
def test_a_rewritten_model_is_the_one_that_is_built_so(policy, inplace):
    """Predictions and gradients are, to the bit, those of a model made with these policies."""
    source = images()
    source.compile("sgd", "mse")
    weights, names = source.get_weights(), [weight.name for weight in source.weights]
    native = images(dict.fromkeys(SAFE, policy))
    native.set_weights(weights)
    model = ga.make_accumulating(source, precision=policy, inplace=inplace)

    assert policies(model) == policies(native)
    assert [weight.name for weight in model.weights] == names
    assert {weight.dtype for weight in model.weights} == {tf.float32}
    for ours, theirs in zip(model.get_weights(), weights):
        np.testing.assert_array_equal(ours, theirs)
    x, y = batch(np.random.default_rng(0), 5)
    np.testing.assert_array_equal(model.predict(x, verbose=0), native.predict(x, verbose=0))
    gradients = []
    for each in (model, native):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((each(x, training=True) - y) ** 2) + sum(each.losses)
        gradients.append(tape.gradient(loss, each.trainable_variables))
    for ours, theirs in zip(*gradients):
        np.testing.assert_array_equal(ours, theirs)


def test_the_source_and_the_global_policy_are_not_touched():
    """A copy is rewritten; what is made later is as it would have been."""
    source = images()
    source.compile("sgd", "mse")
    before = policies(source)
    ga.make_accumulating(source, precision="mixed_float16")
    assert policies(source) == before
    assert tf_keras.mixed_precision.global_policy().name == "float32"
    assert layers.Dense(1).dtype_policy.name == "float32"


#: By what a layer stands for, a layer for inputs [batch, 4, 4], and a word of the reason to keep it.
KEPT = {
    "softmax": (layers.Softmax, "exponents"),
    "softmax as an activation": (lambda: layers.Dense(4, "softmax"), "softmax"),
    "tf.nn.softmax": (lambda: layers.Activation(tf.nn.softmax), "softmax"),
    "group norm": (lambda: layers.GroupNormalization(2), "squares"),
    "unit norm": (layers.UnitNormalization, "squares"),
    "global mean": (lambda: layers.GlobalAveragePooling1D(keepdims=True), "sum of all positions"),
    "activity": (lambda: layers.Dense(4, activity_regularizer="l2"), "activity regulariser"),
    "raw data": (lambda: layers.Rescaling(1 / 255), "raw data"),
    "lambda": (lambda: layers.Lambda(lambda x: x + 1.0), "not known"),
    "op": (lambda: tf.math.exp, "not known to be safe"),
}


@pytest.mark.parametrize("kind", KEPT)
def test_what_is_not_safe_stays_in_float32_with_its_reason(kind):
    """Each kind of layer of the list is left, named with its reason, and the model trains."""
    make, reason = KEPT[kind]
    inputs = tf_keras.Input([4, 4])
    hidden = layers.Dense(4, name="first")(inputs)
    layer = make()
    outputs = layers.Dense(1, name="head")(layers.Dense(4, name="last")(layer(hidden)))
    model = tf_keras.Model(inputs, outputs)
    model.compile("sgd", "mse")
    model = ga.make_accumulating(model, 2, precision="mixed_float16")
    found = {each.name: each for each in ga.explain(model).layers}
    assert (found["first"].after, found["last"].after) == ("mixed_float16", "mixed_float16")
    kept = [each for each in found.values() if reason in each.reason]
    assert [each.after for each in kept] == ["float32"]
    assert all(each.after == "float32" for each in found.values() if "which is left" in each.reason)
    model.fit(np.ones([4, 4, 4]), np.ones([4, 4, 1]), batch_size=2, verbose=0)
    assert np.isfinite(model.get_weights()[0]).all()


@pytest.mark.parametrize(
    ("end", "ending"),
    [
        (lambda x: layers.Dense(2, name="a")(x) * 1.0, {"a", "tf.math.multiply"}),
        (
            lambda x: layers.Activation("sigmoid", name="b")(layers.Dense(2, name="a")(x)),
            {"a", "b"},
        ),
        (lambda x: [tf_keras.Sequential([layers.Dense(2, name="a")], name="n")(x)], {"a"}),
        (
            lambda x: [layers.Dense(2, name="a")(x), layers.Dense(2, name="b", dtype="float32")(x)],
            {"a", "b"},
        ),
        (
            lambda x: layers.Add(name="b")([x, layers.Dense(4, name="a")(x)]),
            {"a", "b"},
        ),
    ],
    ids=["layer", "activation", "nested", "two outputs", "residual"],
)
def test_the_layers_that_end_the_model_stay_in_float32(end, ending):
    """From the last layers with weights on, so that losses see float32."""
    inputs = tf_keras.Input([4])
    model = tf_keras.Model(inputs, end(layers.Dense(4, name="first")(inputs)))
    model = ga.make_accumulating(model, precision="mixed_bfloat16")
    found = {each.name: each for each in ga.explain(model).layers}
    assert {name for name, each in found.items() if each.reason == "it ends the model"} == ending
    assert found["first"].after == "mixed_bfloat16"
    assert {output.dtype for output in tf.nest.flatten(model(np.ones([2, 4])))} == {tf.float32}


def test_keep_leaves_layers_with_all_that_is_in_them():
    """Names and globs, of layers and of nested models."""
    model = images()
    model = ga.make_accumulating(
        model, precision=ga.Precision("mixed_float16", keep=("blo*", "lstm"))
    )
    kept = {each.name for each in ga.explain(model).layers if each.reason == "it is named in keep"}
    assert {"depthwise", "norm", "lstm"} <= kept
    assert policies(model)["conv"] == "mixed_float16"
    assert policies(model)["depthwise"] == policies(model)["lstm"] == "float32"
    assert model(np.ones([1, 6, 6, 2])).dtype == tf.float32


def test_layers_with_a_policy_of_their_own_keep_it():
    """What does not compute in float32 is not asked to."""
    model = tf_keras.Sequential(
        [
            tf_keras.Input([4]),
            layers.Dense(3, dtype="float64", name="wide"),
            layers.Dense(3, dtype="mixed_bfloat16", name="half"),
            layers.Dense(3, name="usual"),
            layers.Dense(1),
        ]
    )
    model = ga.make_accumulating(model, precision="mixed_float16")
    found = {each.name: each for each in ga.explain(model).layers}
    assert found["wide"].after == "float64"
    assert found["half"].after == "mixed_bfloat16"
    assert found["usual"].after == "mixed_float16"
    assert found["half"].reason == "it has a policy of its own, mixed_bfloat16"


def test_tensors_of_both_precisions_meet_in_an_op():
    """An op on tensors of a kept layer, of an input and of a rewritten layer works as before."""
    inputs = tf_keras.Input([4])
    hidden = layers.Dense(4)(inputs)
    soft = layers.Softmax()(hidden)
    mixed = tf.concat([hidden * soft + inputs, tf.math.exp(hidden) - hidden], -1)
    source = tf_keras.Model(inputs, layers.Dense(1)(mixed))
    source.compile("sgd", "mse")
    model = ga.make_accumulating(source, 2, precision="mixed_bfloat16")
    x, y = rows()
    np.testing.assert_allclose(model.predict(x, verbose=0), source.predict(x, verbose=0), atol=0.1)
    model.fit(x, y, batch_size=3, verbose=0)
    assert int(model.optimizer.iterations) == 2


@pytest.mark.parametrize("policy", HALF)
def test_float32_is_the_way_back_from_16_bits(policy):
    """A mixed model computes as one in float32 with its weights, and `strip` gives it back."""
    mixed = images(dict.fromkeys(SAFE, policy))
    mixed.compile("sgd", "mse")
    plain = images()
    plain.set_weights(mixed.get_weights())
    model = ga.make_accumulating(mixed, precision="float32")
    assert set(policies(model).values()) == {"float32"}
    x, _ = batch(np.random.default_rng(0), 3)
    np.testing.assert_array_equal(model.predict(x, verbose=0), plain.predict(x, verbose=0))
    back = ga.strip_accumulating(model)
    assert policies(back) == policies(mixed)
    np.testing.assert_array_equal(back.predict(x, verbose=0), mixed.predict(x, verbose=0))


@pytest.mark.long
@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
def test_strip_gives_back_the_plain_model(inplace):
    """Classes, policies, the optimizer within the wrapper, its state, and the weights."""
    source = images()
    source.compile(tf_keras.optimizers.Adam(0.01), "mse")
    kinds = [type(layer) for layer in source.submodules if isinstance(layer, layers.Layer)]
    configs = [layer.get_config() for layer in source.layers]
    model = converted(source, accum_steps=2, precision="mixed_float16", batch_norm="pooled")
    assert [layer.get_config() for layer in model.layers] == configs  # the plain layers' own
    data = [batch(np.random.default_rng(seed), 4) for seed in range(2)]
    for x, y in data:
        model.train_on_batch(x, y)
    weights = model.get_weights()
    plain = ga.strip_accumulating(model, inplace=inplace)
    assert [type(layer) for layer in plain.submodules if isinstance(layer, layers.Layer)] == kinds
    assert type(plain.optimizer) is tf_keras.optimizers.Adam
    assert int(plain.optimizer.iterations) == 1
    assert set(policies(plain).values()) == {"float32"}
    reference = images()
    reference.set_weights(weights)
    x, y = data[0]
    np.testing.assert_array_equal(plain.predict(x, verbose=0), reference.predict(x, verbose=0))
    plain.fit(x, y, verbose=0)
    assert int(plain.optimizer.iterations) == 2


# ---- models of the user's own --------------------------------------------------------------


class Tower(tf_keras.Model):
    """With a residual around its inputs, weights of its own, and a layer that is made late."""

    def __init__(self):
        super().__init__()
        self.first = layers.Dense(4, "tanh", name="first")
        self.scale = self.add_weight(name="scale", shape=[4], initializer="ones")

    def build(self, shape):
        self.head = layers.Dense(1, name="late")
        super().build(shape)

    def call(self, x):
        return self.head((self.first(x) + x) * self.scale)


@pytest.mark.parametrize("is_built", [True, False], ids=["built", "unbuilt"])
@pytest.mark.parametrize("policy", HALF)
def test_subclassed_models_are_rewritten_in_place(policy, is_built):
    """Also layers that are made in the first step; weights stay float32, the loss is one of float32."""
    x, y = rows()
    model = Tower()
    model.compile("sgd", "mse")
    if is_built:
        model(x)
    precision = ga.Precision(policy, initial_scale=64.0)
    ga.make_accumulating(model, transforms=[precision, ga.Accumulate(2)], inplace=True)
    model.fit(x, y, batch_size=3, epochs=2, verbose=0)
    found = {each.name: each.after for each in ga.explain(model).layers}
    assert found == {model.name: policy, "first": policy, "late": "float32"}
    assert {weight.dtype for weight in model.weights} == {tf.float32}
    assert model.first(x).dtype.name == policy[len("mixed_") :]
    assert int(model.optimizer.iterations) == 4
    reference = Tower()
    reference(x)
    reference.set_weights(model.get_weights())
    np.testing.assert_allclose(model(x), reference(x), atol=0.05)
    ga.strip_accumulating(model, inplace=True)
    np.testing.assert_array_equal(model(x), reference(x))


def test_a_sequential_model_without_inputs_is_rewritten_when_it_is_built():
    """Its first step tells what its layers are."""
    model = tf_keras.Sequential([layers.Dense(4, name="first"), layers.Dense(1, name="last")])
    model.compile("sgd", "mse")
    ga.make_accumulating(model, 2, precision="mixed_bfloat16", inplace=True)
    x, y = rows()
    model.fit(x, y, batch_size=3, verbose=0)
    found = {each.name: each.after for each in ga.explain(model).layers}
    assert found == {"first": "mixed_bfloat16", "last": "float32"}


def test_what_was_traced_before_does_not_serve_after():
    """`predict` and `evaluate` are in the precision that the model has, there and back."""
    model = small()
    x, y = rows()
    wide = model.predict(x, verbose=0), model.evaluate(x, y, verbose=0)
    ga.make_accumulating(model, 2, precision="mixed_bfloat16", inplace=True)
    half = model.predict(x, verbose=0), model.evaluate(x, y, verbose=0)
    assert (half[0] != wide[0]).any()
    assert half[1] != wide[1]
    ga.strip_accumulating(model, inplace=True)
    np.testing.assert_array_equal(model.predict(x, verbose=0), wide[0])
    assert model.evaluate(x, y, verbose=0) == wide[1]


class Mixing(tf_keras.Model):
    """Adds a tensor that is always of float32."""

    def __init__(self):
        super().__init__()
        self.first, self.head = layers.Dense(4), layers.Dense(1)

    def call(self, x):
        return self.head(self.first(x) + tf.ones([4]))


def test_a_model_whose_code_mixes_precisions_is_refused_and_left_as_it_was():
    """One line says what its code raises and what to do; a built model is not half-changed."""
    x, y = rows()
    model = Mixing()
    model.compile("sgd", "mse")
    expected = model(x).numpy()
    text = (
        r"^Precision\(policy='mixed_float16'\) must be given a model whose own code takes tensors "
        r"of 16 bits; got 'mixing', which raises: .*float16.* Cast them there, or name its layers "
        r"in Precision\(keep=\.\.\.\)\.$"
    )
    with pytest.raises(ValueError, match=text):
        ga.make_accumulating(model, 2, precision="mixed_float16", inplace=True)
    assert type(model) is Mixing
    assert type(model.optimizer) is tf_keras.optimizers.SGD
    np.testing.assert_array_equal(model(x), expected)
    model.fit(x, y, verbose=0)


class Choosing(layers.Layer):
    """Its code is converted by AutoGraph."""

    def call(self, x):
        if tf.reduce_mean(x) > 0:
            return x * 2
        return x


class Asserting(layers.Layer):
    """Takes float32, and raises what it likes."""

    def call(self, x, training=None):
        assert not training or x.dtype == tf.float32
        return x


def test_code_of_ones_own_is_tried_as_it_trains():
    """What AutoGraph converts is no error; what fails only in training is, of whatever type."""
    x, y = rows()
    for kind in (Choosing, Asserting):
        inputs = tf_keras.Input([4])
        hidden = kind(name="own")(layers.Dense(4, name="first")(inputs))
        model = tf_keras.Model(inputs, layers.Dense(1)(hidden))
        model.compile("sgd", "mse")
        if kind is Choosing:
            ga.make_accumulating(model, 2, precision="mixed_bfloat16", inplace=True)
        else:
            with pytest.raises(ValueError, match=r"^Precision.* raises: AssertionError.*keep="):
                ga.make_accumulating(model, 2, precision="mixed_float16", inplace=True)
            assert not isinstance(model, AccumulatingModel)
            assert type(model.optimizer) is tf_keras.optimizers.SGD
            assert model.layers[1].dtype_policy.name == "float32"
            keep = ga.Precision("mixed_float16", keep="own")
            ga.make_accumulating(model, 2, precision=keep, inplace=True)
        model.fit(x, y, batch_size=3, verbose=0)
        assert np.isfinite(model.get_weights()[0]).all()


def test_losses_see_float32_whatever_ends_a_model():
    """Also where a step of the model's own hands its outputs to the compiled loss."""

    class HeadFirst(tf_keras.Model):
        def __init__(self):
            super().__init__()
            self.head, self.body = layers.Dense(1), layers.Dense(8)

        def call(self, x):
            return self.head(self.body(x))

        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                loss = self.compiled_loss(y, self(x, training=True))
            self.optimizer.minimize(loss, self.trainable_variables, tape=tape)
            return {"loss": loss}

    model = HeadFirst()
    model.compile("sgd", "mse")
    model(np.ones([1, 4]))
    ga.make_accumulating(model, 2, precision="mixed_float16", inplace=True)
    x, y = rows(4)
    loss = model.train_on_batch(x, 300 + y)
    np.testing.assert_allclose(loss, 300**2, rtol=0.05)  # float16 ends at 65,504


def test_nested_models_predict_in_the_precision_that_they_have():
    """What a nested model has traced goes with the rewrite, there and back."""
    base = tf_keras.Sequential([tf_keras.Input([4]), layers.Dense(3)])
    inputs = tf_keras.Input([4])
    model = tf_keras.Model(inputs, layers.Dense(1)(base(inputs)))
    x, _ = rows()
    dtypes = [base.predict(x, verbose=0).dtype.name]
    ga.make_accumulating(model, precision="mixed_float16", inplace=True)
    dtypes.append(base.predict(x, verbose=0).dtype.name)
    ga.strip_accumulating(model, inplace=True)
    dtypes.append(base.predict(x, verbose=0).dtype.name)
    assert dtypes == ["float32", "float16", "float32"]


class Shared(layers.Layer):
    """Reads the weights of another layer, and keeps some of its own in a list."""

    def __init__(self, other=None, **kwargs):
        super().__init__(**kwargs)
        self.table = None if other is None else other.kernel
        self.parts = [] if other is not None else None

    def build(self, shape):
        if self.parts is None:
            self.parts = [self.add_weight(name="part", shape=[4], initializer="ones")]

    def call(self, x):
        return tf.matmul(x, self.table) if self.table is not None else x * self.parts[0]


def test_weights_that_layers_share_or_keep_in_lists():
    """A shared weight casts itself for whoever reads it; a layer that keeps a list is left."""
    first = layers.Dense(4, name="first", use_bias=False)
    first.build([None, 4])
    model = tf_keras.Sequential(
        [
            tf_keras.Input([4]),
            first,
            Shared(first, name="shared"),
            Shared(name="listed"),
            layers.Dense(1),
        ]
    )
    model.compile("sgd", "mse")
    ga.make_accumulating(model, 2, precision="mixed_bfloat16", inplace=True)
    found = {each.name: each for each in ga.explain(model).layers}
    assert found["shared"].after == found["first"].after == "mixed_bfloat16"
    assert found["listed"].reason == (
        "its weights stand in lists or dicts, where they cannot cast themselves"
    )
    x, y = rows()
    model.fit(x, y, batch_size=3, verbose=0)
    assert len(model.trainable_weights) == 4
    assert model.layers[1].table is model.layers[0].kernel


# ---- the loss scale ------------------------------------------------------------------------


def test_float16_wraps_the_compiled_optimizer_once():
    """With the scale that was asked for; bfloat16 needs none; compiling again wraps the new one."""
    spec = ga.Precision("mixed_float16", initial_scale=64.0, growth_steps=7)
    model = ga.make_accumulating(small("adam"), precision=spec)
    for _ in range(2):
        assert isinstance(model.optimizer, LossScaleOptimizer)
        assert isinstance(model.optimizer.inner_optimizer, tf_keras.optimizers.Optimizer)
        assert float(model.optimizer.loss_scale) == 64.0
        assert model.optimizer.dynamic_growth_steps == 7
        model.compile("sgd", "mse")
    fixed = ga.Precision("mixed_float16", initial_scale=8.0, dynamic=False)
    model = ga.make_accumulating(small(), precision=fixed)
    assert (float(model.optimizer.loss_scale), model.optimizer.dynamic) == (8.0, False)
    model = ga.make_accumulating(small(), precision="mixed_bfloat16")
    assert not isinstance(model.optimizer, LossScaleOptimizer)


@pytest.mark.parametrize("make", [tf_keras.optimizers.SGD, tf_keras.optimizers.legacy.SGD])
def test_an_optimizer_that_is_wrapped_is_respected(make):
    """Its own scale stays, and so does the wrapper when the conversion is undone."""
    scaled = LossScaleOptimizer(make(0.1), initial_scale=16.0)
    model = ga.make_accumulating(small(scaled), 2, precision="mixed_float16")
    assert float(model.optimizer.loss_scale) == 16.0
    assert not isinstance(model.optimizer.inner_optimizer, LossScaleOptimizer)
    assert isinstance(ga.strip_accumulating(model).optimizer, LossScaleOptimizer)
    ours = ga.make_accumulating(small(make(0.1)), 2, precision="mixed_float16")
    ours.compile(LossScaleOptimizer(make(0.1), initial_scale=16.0), "mse")
    assert isinstance(ga.strip_accumulating(ours).optimizer, LossScaleOptimizer)
    ours = ga.make_accumulating(small(make(0.1)), 2, precision="mixed_float16")
    assert type(ga.strip_accumulating(ours).optimizer) is make


@pytest.mark.parametrize("split", [False, True], ids=["across", "split"])
def test_a_change_of_scale_never_mixes_two_scales(split):
    """The scale is off a gradient before it is summed: a change in mid-window changes nothing."""
    ends = []
    for changes in (False, True):
        tf_keras.utils.set_random_seed(3)
        spec = ga.Precision("mixed_float16", initial_scale=8.0)
        chain = [spec, *([ga.Split(3)] if split else []), ga.Accumulate(2)]
        model = ga.make_accumulating(small(), transforms=chain)
        x, y = rows()
        for start in (0, 6):
            model.train_on_batch(x[start : start + 6], y[start : start + 6])
            if changes:
                model.optimizer._loss_scale.current_loss_scale.assign(1024.0)
        assert int(model.optimizer.iterations) == 1
        ends.append(model.get_weights())
    for one, other in zip(*ends):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


def test_the_scale_moves_once_an_update():
    """It grows after so many updates, not micro-batches; the counter counts updates."""
    spec = ga.Precision("mixed_float16", initial_scale=8.0, growth_steps=2)
    model = ga.make_accumulating(small(), 3, precision=spec)
    x, y = rows(24)
    seen = []
    for start in range(0, 24, 2):
        model.train_on_batch(x[start : start + 2], y[start : start + 2])
        seen.append((float(model.optimizer.loss_scale), int(model.optimizer.dynamic_counter)))
    assert seen[2::3] == [(8.0, 1), (16.0, 0), (16.0, 1), (32.0, 0)]
    assert seen[0] == seen[1] == (8.0, 0)


@pytest.mark.parametrize("windows", [{"accum_steps": 3}, {"micro_batch_size": 2}], ids=str)
@pytest.mark.parametrize("policy", HALF)
def test_logs_are_the_true_losses_and_clips_see_unscaled_gradients(policy, windows):
    """Losses and weights are those of the large batch in float32, within what 16 bits can hold."""
    chain = [ga.Precision(policy, initial_scale=256.0)]
    if "micro_batch_size" in windows:
        chain.append(ga.Split(2))
    chain += [ga.Accumulate(windows.get("accum_steps", 1)), ga.ClipByGlobalNorm(0.05)]
    optimizer = tf_keras.optimizers.SGD(0.5, global_clipnorm=0.05)
    source = small(tf_keras.optimizers.SGD(0.5))
    start = cases.weights_of(source)
    model = ga.make_accumulating(source, transforms=chain)
    source.compile(optimizer, "mse")
    x, y = rows(24)
    how = {"epochs": 3, "shuffle": False, "verbose": 0}
    size = 2 if "accum_steps" in windows else 6
    ours = model.fit(x, y, batch_size=size, **how).history["loss"]
    theirs = source.fit(x, y, batch_size=6, **how).history["loss"]
    tolerance = 0.002 if policy == "mixed_float16" else 0.02
    np.testing.assert_allclose(ours, theirs, rtol=tolerance)
    cases.assert_same_weights(model, source, start, 10 * tolerance)


def test_small_gradients_survive_in_float16():
    """A gradient below what float16 can hold reaches the weights by the scale alone."""
    moved = {}
    for scale in (1.0, 2.0**14):
        tf_keras.utils.set_random_seed(0)
        source = small(tf_keras.optimizers.SGD(1e7), loss_weights=1e-10)
        spec = ga.Precision("mixed_float16", initial_scale=scale, dynamic=False)
        model = ga.make_accumulating(source, 2, precision=spec)
        x, y = rows(4)
        before = model.get_weights()[0]
        model.fit(x, y, batch_size=2, verbose=0)
        moved[scale] = np.abs(model.get_weights()[0].astype("float64") - before).max()
    assert moved[1.0] < 0.5 * moved[2.0**14]


class Unscaled(tf_keras.Model):
    """Takes its gradients by itself, of a loss that nothing scales."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables))
        return {"loss": loss}


def test_a_loss_that_is_not_scaled_is_named():
    """A `train_step` of the model's own that scales nothing is told so, and how to."""
    inputs = tf_keras.Input([4])
    model = Unscaled(inputs, layers.Dense(1)(layers.Dense(3)(inputs)))
    model.compile("sgd", "mse")
    model = ga.make_accumulating(model, 2, precision="mixed_float16", inplace=True)
    x, y = rows(4)
    with pytest.warns(ga.InexactWarning, match="LossScaleOptimizerV3 is not scaled.*minimize"):
        model.train_on_batch(x, y)


# ---- in files ------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["model.keras", "model.h5", "savedmodel", "checkpoint"])
def test_the_dynamic_scale_and_its_counter_survive(tmp_path, file):
    """They are what they were, also where tf_keras itself loses them; and training goes on."""
    spec = ga.Precision("mixed_float16", initial_scale=8.0, growth_steps=3)

    def make():
        tf_keras.utils.set_random_seed(1)
        return ga.make_accumulating(small("adam"), 2, precision=spec)

    model = make()
    x, y = rows(16)
    model.fit(x, y, batch_size=2, verbose=0)  # 4 updates
    path = tmp_path / file
    if file == "checkpoint":
        loaded = make()
        tf.train.Checkpoint(loaded).read(tf.train.Checkpoint(model).write(str(path)))
    else:
        model.save(path)
        loaded = tf_keras.models.load_model(path)
    for each in (model, loaded):
        assert float(each.optimizer.loss_scale) == 16.0
        assert int(each.optimizer.dynamic_counter) == 1
        assert [layer.dtype_policy.name for layer in each.layers] == ["mixed_float16", "float32"]
    assert ga.explain(loaded).changed == ga.explain(model).changed
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))
    for each in (model, loaded):
        each.fit(x, y, batch_size=2, verbose=0)
    for ours, theirs in zip(loaded.get_weights(), model.get_weights()):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert type(ga.strip_accumulating(loaded).optimizer) is tf_keras.optimizers.Adam


def test_a_file_is_the_plain_model_and_the_chain(tmp_path):
    """Without the conversion, what is saved is the plain model: the same layers, in float32."""
    source = images()
    source.compile("sgd", "mse")
    model = converted(source, accum_steps=2, precision="mixed_bfloat16", batch_norm="pooled")
    config = model.get_config()
    config.pop("ga_transform")
    assert config == source.get_config()
    model.save_weights(tmp_path / "w.weights.h5")
    source.load_weights(tmp_path / "w.weights.h5")


# ---- explain -------------------------------------------------------------------------------


def test_explain_prints_which_layers_changed():
    """A row for each layer, with what it was, what it is, and why it was left."""
    model = ga.make_accumulating(small(), 2, precision="mixed_bfloat16")
    assert str(ga.explain(model)).splitlines()[-4:] == [
        "precision: 1 of 2 layers changed",
        "layer   class  before   now             left as it was, because",
        "hidden  Dense  float32  mixed_bfloat16",
        "head    Dense  float32  float32         it ends the model",
    ]
