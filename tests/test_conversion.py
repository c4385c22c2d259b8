"""The conversion: what is carried over, what stays untouched, and the way back."""

import inspect
import re

import cases
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from tf_keras import layers

import ga_transform as ga


def small(**compile_arguments):
    model = tf_keras.Sequential([tf_keras.Input([3]), layers.Dense(2, "tanh"), layers.Dense(1)])
    if compile_arguments:
        model.compile(**compile_arguments)
    return model


def state_of(model):
    state = [weight.numpy() for weight in model.weights]
    optimizer = getattr(model, "optimizer", None)
    if optimizer is not None:
        variables = optimizer.variables() if callable(optimizer.variables) else optimizer.variables
        state += [variable.numpy() for variable in variables]
    return state


# tf_keras's Nadam keeps part of its state in a Python counter, which its traces advance.
@pytest.mark.parametrize("optimizer", [name for name in cases.OPTIMIZERS if name != "nadam"])
def test_converted_half_way_it_goes_on_as_the_plain_model(float64, optimizer):
    """Slots, iterations and hyper-parameters come along, for every optimizer."""
    case = cases.words()
    case.model.compile(cases.OPTIMIZERS[optimizer](), **case.compile)
    batches = cases.make_batches(case, [[4, 3], [6, 2]])
    for window in batches:
        case.model.train_on_batch(*cases.concatenate(window))
    start = cases.weights_of(case.model)
    copy = ga.make_accumulating(case.model, 2)
    for window in batches:
        for batch in window:
            copy.train_on_batch(*batch)
        case.model.train_on_batch(*cases.concatenate(window))
    cases.assert_same_weights(copy, case.model, start, 1e-9)
    assert int(copy.optimizer.iterations) == 4


@pytest.mark.parametrize("option", cases.OPTIONS)
def test_options_of_an_optimizer_come_along(float64, option):
    """Averages, decay, clips, schedules and the loss scale come along half-way."""
    case = cases.dense()
    case.model.compile(cases.OPTIONS[option](), "mse")
    window = cases.make_batches(case, [[4, 3]])[0]
    case.model.train_on_batch(*cases.concatenate(window))
    start = cases.weights_of(case.model)
    copy = ga.make_accumulating(case.model, 2)
    for batch in window:
        copy.train_on_batch(*batch)
    case.model.train_on_batch(*cases.concatenate(window))
    cases.assert_same_weights(copy, case.model, start, 1e-9)


def test_excluded_from_weight_decay_comes_along(float64):
    """Variables excluded from weight decay, by object and by name, are excluded in the copy."""
    model = small()
    optimizer = tf_keras.optimizers.AdamW(0.1, weight_decay=0.5)
    optimizer.exclude_from_weight_decay([model.layers[0].kernel], ["bias"])
    model.compile(optimizer, "mse")
    start = cases.weights_of(model)
    copy = ga.make_accumulating(model, 1)
    for each in (model, copy):
        each.train_on_batch(np.ones([2, 3]), np.ones([2, 1]))
    cases.assert_same_weights(copy, model, start, 1e-9)


def test_the_source_is_untouched():
    """Neither conversion nor the training of the copy changes anything of the source."""
    model = small(optimizer="adam", loss="mse", metrics=[tf_keras.metrics.MeanAbsoluteError()])
    x, y = np.ones([4, 3]), np.ones([4, 1])
    model.fit(x, y, verbose=0)
    before, names, kind = state_of(model), sorted(vars(model)), type(model)
    optimizer_names = sorted(vars(model.optimizer))
    function = model.train_function
    copy = ga.make_accumulating(model, 2)
    copy.fit(x, y, batch_size=1, verbose=0)
    tf.nest.map_structure(np.testing.assert_array_equal, before, state_of(model))
    assert (sorted(vars(model)), type(model), model.train_function) == (names, kind, function)
    assert sorted(vars(model.optimizer)) == optimizer_names
    assert not {id(v) for v in model.variables} & {id(v) for v in copy.variables}


def test_the_compile_state_comes_along():
    """Losses, weights, metrics and the ways to run are those of the source."""
    case = cases.branches()
    data = case.batch(np.random.default_rng(0), 6)
    case.model.compile(
        "adam", **case.compile, steps_per_execution=3,
        metrics={"score": [tf_keras.metrics.RootMeanSquaredError("rmse"), "mae"], "kind": "accuracy"},
        weighted_metrics={"score": ["mse"]},
    )  # fmt: skip
    for trained in (False, True):
        if trained:
            case.model.fit(*data, verbose=0)
        copy = ga.make_accumulating(case.model, 2)
        assert copy.loss == case.model.loss
        assert copy.steps_per_execution == case.model.steps_per_execution
        copy.fit(*data, verbose=0)
        case.model.fit(*data, verbose=0)
        assert copy.metrics_names == case.model.metrics_names
    for own, other in zip(copy.metrics, case.model.metrics):
        assert own is not other


@pytest.mark.parametrize(
    "how", [{"run_eagerly": True}, {"jit_compile": True}, {"steps_per_execution": 5}], ids=str
)
def test_ways_to_run_come_along(how):
    """`run_eagerly`, `jit_compile` and `steps_per_execution` are carried over."""
    copy = ga.make_accumulating(small(optimizer="sgd", loss="mse", **how), 2)
    for name, value in how.items():
        assert getattr(copy, name) == value


@pytest.mark.parametrize("model", cases.MODELS)
def test_nothing_the_user_sees_moves(model):
    """Weights, names, counts and the summary are the source's, before and after training."""
    case = cases.MODELS[model]()
    case.model.compile("adam", **case.compile)
    copy = ga.make_accumulating(case.model, 2)
    data = case.batch(np.random.default_rng(0), 3)

    def seen(each):
        lines = []
        each.summary(print_fn=lambda line, **_: lines.append(line))
        names = [[v.name for v in each.weights], [v.name for v in each.trainable_variables]]
        return lines, names, each.count_params(), len(each.get_weights()), each.name

    for _ in range(2):
        assert seen(copy) == seen(case.model)
        copy.train_on_batch(*data)
        case.model.train_on_batch(*data)


def test_uncompiled_and_unbuilt_models():
    """A model is compiled, and built, after conversion as usual."""
    x, y = np.ones([4, 3]), np.ones([4, 1])
    for compile_first in (False, True):
        model = tf_keras.Sequential([layers.Dense(2), layers.Dense(1)])
        if compile_first:
            model.compile("adam", "mse")
        else:
            assert ga.make_accumulating(small(), 2).pending_micro_batches == 0
        copy = ga.make_accumulating(model, 2)
        assert copy.pending_micro_batches == 0
        if not compile_first:
            copy.compile("adam", "mse")
        copy.fit(x, y, batch_size=2, verbose=0)
        assert int(copy.optimizer.iterations) == 1


def test_frozen_layers_stay_frozen():
    """Frozen layers, nested ones too, are frozen in the copy, and their weights rest."""
    inner = tf_keras.Sequential([tf_keras.Input([3]), layers.Dense(3), layers.Dense(3)])
    model = tf_keras.Sequential([tf_keras.Input([3]), inner, layers.Dense(1)])
    inner.layers[0].trainable = False
    model.compile("sgd", "mse")
    copy = ga.make_accumulating(model, 2)
    assert [v.name for v in copy.trainable_weights] == [v.name for v in model.trainable_weights]
    copy.fit(np.ones([4, 3]), np.ones([4, 1]), batch_size=1, verbose=0)
    np.testing.assert_array_equal(copy.layers[0].layers[0].kernel, inner.layers[0].kernel)


def test_objects_that_were_never_registered():
    """Custom layers, functions, initializers, losses, metrics and schedules need no registry."""

    class Doubled(layers.Layer):
        def call(self, inputs):
            return inputs * 2

    class Halving(tf_keras.optimizers.schedules.LearningRateSchedule):
        def __call__(self, step):
            return 0.1 * 0.5 ** tf.cast(step, tf.float32)

        def get_config(self):
            return {}

    class Worst(tf_keras.metrics.Mean):
        def update_state(self, y_true, y_pred, sample_weight=None):
            return super().update_state(tf.reduce_max(tf.abs(y_true - y_pred)))

    def loss(y_true, y_pred):
        return tf.reduce_mean(tf.abs(y_true - y_pred), axis=-1)

    def bent(inputs):
        return tf.where(inputs > 0, inputs, 0.1 * inputs)

    inner = tf_keras.Sequential([tf_keras.Input([3]), Doubled(), layers.Dense(4, bent)])
    scale = 3.0
    inputs = tf_keras.Input([3])
    hidden = layers.Lambda(lambda z: z * scale)(inner(inputs))
    hidden = layers.Dense(2, activation=lambda z: 2 * tf.sin(z))(hidden)
    model = tf_keras.Model(inputs, layers.Dense(1)(tf.nn.relu(hidden) + 1.0))
    model.compile(tf_keras.optimizers.SGD(Halving()), loss, metrics=[Worst("worst")])
    copy = ga.make_accumulating(model, 2)
    x, y = np.random.default_rng(0).normal(size=[4, 3]), np.ones([4, 1])
    copy.fit(x, y, batch_size=2, shuffle=False, verbose=0)
    model.train_on_batch(x, y)
    for own, other in zip(copy.get_weights(), model.get_weights()):
        np.testing.assert_allclose(own, other, rtol=1e-5, atol=1e-6)


def test_vocabularies_and_statistics_come_along():
    """What preprocessing layers have adapted to is in the copy."""
    text = layers.TextVectorization(output_sequence_length=3)
    text.adapt(["a b c", "a b", "a"])
    inputs = tf_keras.Input([], dtype="string")
    words = tf_keras.Model(inputs, layers.Dense(1)(layers.Embedding(9, 2)(text(inputs))))
    normal = layers.Normalization()
    normal.adapt(np.array([[1.0], [5.0]]))
    numbers = tf_keras.Sequential([tf_keras.Input([1]), normal, layers.Dense(1)])
    for model, x in ((words, np.array(["b a", "c q"])), (numbers, np.array([[1.0], [2.0]]))):
        model.compile("adam", "mse")
        copy = ga.make_accumulating(model, 2)
        np.testing.assert_array_equal(copy.predict(x, verbose=0), model.predict(x, verbose=0))


def test_what_cannot_be_copied_is_named():
    """A part that is in no config is named, and in place the same model converts."""
    hidden = layers.Dense(2)
    model = tf_keras.Sequential([tf_keras.Input([3]), hidden, layers.Dense(1)])
    model.add_loss(lambda: tf.reduce_sum(hidden.kernel**2))
    model.compile("sgd", "mse")
    with pytest.raises(
        ValueError, match=r"a function passed to add_loss.*inplace=True: it copies nothing\.$"
    ):
        ga.make_accumulating(model, 2)
    assert ga.make_accumulating(model, 2, inplace=True) is model
    model.fit(np.ones([4, 3]), np.ones([4, 1]), batch_size=1, verbose=0)
    assert int(model.optimizer.iterations) == 2


def assert_goes_on_alike(model, *data, tolerance=1e-9):
    """One batch a window: the copy takes the step that the source takes."""
    start = cases.weights_of(model)
    copy = ga.make_accumulating(model, 1)
    for each in (model, copy):
        each.train_on_batch(*data)
    cases.assert_same_weights(copy, model, start, tolerance)
    return copy


def test_a_layer_inside_and_outside_of_a_nested_model(float64):
    """A layer that is shared with nested models is one layer in the copy, too."""
    shared = layers.Dense(3, "tanh")
    inner_inputs = tf_keras.Input([3])
    inner = tf_keras.Model(inner_inputs, shared(shared(inner_inputs)))
    inputs = tf_keras.Input([3])
    model = tf_keras.Model(inputs, layers.Dense(1)(inner(shared(inputs))))
    model.compile(tf_keras.optimizers.SGD(0.1), "mse")
    assert_goes_on_alike(model, np.ones([2, 3]), np.ones([2, 1]))


def test_the_states_of_stateful_layers_come_along(float64):
    """A stateful recurrent layer goes on where it was."""
    model = tf_keras.Sequential(
        [tf_keras.Input([2, 3], batch_size=4), layers.LSTM(2, stateful=True), layers.Dense(1)]
    )
    model.compile(tf_keras.optimizers.SGD(0.1), "mse")
    x = np.random.default_rng(0).normal(size=[4, 2, 3])
    model.train_on_batch(x, np.ones([4, 1]))
    assert_goes_on_alike(model, x, np.ones([4, 1]))


def test_transformers_of_legacy_optimizers_come_along(float64):
    """What a legacy optimizer is given beside its config acts in the copy."""

    def halved(pairs):
        return [(gradient / 2, variable) for gradient, variable in pairs]

    model = small()
    model.compile(cases.legacy.SGD(0.1, gradient_transformers=[halved]), "mse")
    assert_goes_on_alike(model, np.ones([2, 3]), np.ones([2, 1]))


def test_frozen_after_compile(float64):
    """`trainable` set after `compile` waits for the next one, as in plain tf_keras."""
    model = small(optimizer=tf_keras.optimizers.SGD(0.1), loss="mse")
    model.layers[0].trainable = False
    start = cases.weights_of(model)
    copy = ga.make_accumulating(model, 1)
    for each in (model, copy):
        each.fit(np.ones([2, 3]), np.ones([2, 1]), verbose=0)
    cases.assert_same_weights(copy, model, start, 1e-9)


class Tuned(tf_keras.Model):
    alpha = 1.0

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
        return self.alpha * super().compute_loss(x, y, y_pred, sample_weight)


def test_attributes_of_a_models_own_come_along(float64):
    """Plain values that were set on a model of the user's class are copied, others refused."""
    inputs = tf_keras.Input([3])
    model = Tuned(inputs, layers.Dense(1)(inputs))
    model.alpha = 0.1
    model.compile(tf_keras.optimizers.SGD(0.1), "mse")
    copy = assert_goes_on_alike(model, np.ones([2, 3]), np.ones([2, 1]))
    assert isinstance(copy, Tuned)
    model.teacher = small()
    with pytest.raises(ValueError, match="its attribute 'teacher' is in no config"):
        ga.make_accumulating(model, 1)


def test_names_of_metrics_of_several_outputs():
    """Metrics that tf_keras has renamed are given their first names, whatever these are."""
    inputs = tf_keras.Input([3])
    outputs = {name: layers.Dense(1, name=name)(inputs) for name in ("a", "a_b")}
    model = tf_keras.Model(inputs, outputs)
    mean = tf_keras.metrics.MeanAbsoluteError
    model.compile(
        "sgd", "mse",
        metrics={"a": [mean("weighted_x"), mean("mae")], "a_b": [mean("b_mae")]},
        weighted_metrics={"a": [mean("mae"), mean("weighted_y")], "a_b": [mean("mae")]},
    )  # fmt: skip
    data = np.ones([2, 3]), {name: np.ones([2, 1]) for name in outputs}
    model.fit(*data, verbose=0)
    copy = ga.make_accumulating(model, 2)
    copy.fit(*data, verbose=0)
    assert copy.metrics_names == model.metrics_names


def refused(model, text):
    with pytest.raises(
        ValueError, match=f"^{re.escape(text)} Pass inplace=True: it copies nothing.$"
    ):
        ga.make_accumulating(model, 2)


class Bare(layers.Layer):
    def __init__(self, width):
        super().__init__(name="bare")
        self.width = width

    def call(self, inputs):
        return inputs


class OwnCompile(tf_keras.Model):
    def compile(self, rate):
        super().compile(tf_keras.optimizers.SGD(rate), "mse")


class WithoutConfig(tf_keras.Model):
    def __init__(self, layer):
        super().__init__(name="model")
        self.layer = layer


class WithoutConfigMetric(tf_keras.metrics.Mean):
    def __init__(self, other):
        super().__init__("odd")


def test_each_part_that_cannot_be_copied_has_its_line():
    """The line names the part, and inplace=True is the way out."""
    refused(
        tf_keras.Sequential([tf_keras.Input([3]), Bare(object())]),
        "A model must have layers that can be made from their configs to be copied; got Bare "
        "'bare', which cannot.",
    )
    refused(
        WithoutConfig(layers.Dense(1)),
        "A model must define get_config to be copied; got WithoutConfig 'model' without one.",
    )
    inputs = tf_keras.Input([3])
    own = OwnCompile(inputs, layers.Dense(1)(inputs), name="model")
    own.compile(0.1)
    refused(
        own,
        "A model must keep the arguments of its own compile as attributes to be copied; got "
        "OwnCompile 'model' without one named 'rate'.",
    )
    refused(
        small(optimizer="sgd", loss="mse", metrics=[WithoutConfigMetric(1)]),
        "A model must be compiled with objects that can be made from their configs to be copied; "
        "got WithoutConfigMetric 'odd', which cannot.",
    )
    optimizer = tf_keras.optimizers.Adam()
    other = tf.Variable([1.0], name="other")
    shared = small()
    optimizer.build([*shared.trainable_variables, other])
    shared.compile(optimizer, "mse")
    with pytest.raises(ValueError, match="must have its optimizer to itself to be copied"):
        ga.make_accumulating(shared, 2)


def test_a_model_that_holds_a_converted_one_is_refused():
    """Windows within windows are refused by name."""
    inner = ga.make_accumulating(small(optimizer="sgd", loss="mse"), 2)
    model = tf_keras.Sequential([tf_keras.Input([3]), inner], name="outer")
    with pytest.raises(ValueError, match=r"must hold no converted model; got .* in 'outer'"):
        ga.make_accumulating(model, 2)


def test_batch_norm_is_named_in_a_warning():
    """What couples rows is outside the law, and said so by name."""
    model = tf_keras.Sequential(
        [tf_keras.Input([3]), layers.BatchNormalization(name="norm"), layers.Dense(1)]
    )
    with pytest.warns(ga.InexactWarning, match="layers: norm"):
        ga.make_accumulating(model, 2)


# ---- the decorator -------------------------------------------------------------------------


def test_the_decorator_keeps_the_function_and_copies_nothing():
    """Signature, name and docstring are the function's; the model is the one that it made."""
    made = []

    def build(width: int, *, depth: int = 1) -> tf_keras.Model:
        """Make a model."""
        made.append(small(optimizer="sgd", loss="mse"))
        return made[-1]

    decorated = ga.accumulating(accum_steps=3, agc=0.02)(build)
    assert inspect.signature(decorated) == inspect.signature(build)
    assert (decorated.__name__, decorated.__doc__) == ("build", "Make a model.")
    model = decorated(2, depth=1)
    assert model is made[0]
    assert model.transforms == ga.Chain(ga.Accumulate(3), ga.ClipByAGC(0.02))
    model.fit(np.ones([6, 3]), np.ones([6, 1]), batch_size=1, verbose=0)
    assert int(model.optimizer.iterations) == 2


def test_in_place_after_training_the_new_training_function_accumulates():
    """What was traced before the conversion is not used after it."""
    model = small(optimizer="sgd", loss="mse")
    x, y = np.ones([4, 3]), np.ones([4, 1])
    model.fit(x, y, batch_size=1, verbose=0)
    ga.make_accumulating(model, 2, inplace=True)
    model.fit(x, y, batch_size=1, verbose=0)
    assert int(model.optimizer.iterations) == 4 + 2


def test_shorthands_and_transforms_give_the_same_chain():
    """Arguments are another way to write the chain."""
    model = small()
    by_name = ga.make_accumulating(model, 4, agc=0.02, remainder="carry")
    by_chain = ga.make_accumulating(
        model, transforms=[ga.Accumulate(4, remainder="carry"), ga.ClipByAGC(0.02)]
    )
    assert by_name.transforms == by_chain.transforms


# ---- the way back --------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [False, True])
def test_stripping_gives_back_a_plain_model(float64, inplace):
    """It has the class, weights, compile and optimizer state, and trains as a plain one."""
    case = cases.branches()
    case.model.compile(cases.OPTIMIZERS["adam"](), **case.compile)
    reference = tf_keras.models.clone_model(case.model)
    kind = type(case.model)
    model = ga.make_accumulating(case.model, 2)
    data = case.batch(np.random.default_rng(0), 4)
    model.train_on_batch(*data)
    model.train_on_batch(*data)
    weights, slots = model.get_weights(), [v.numpy() for v in model.optimizer.variables]
    back = ga.strip_accumulating(model, inplace=inplace)
    assert type(back) is kind is type(reference)
    assert (back is model) == inplace
    tf.nest.map_structure(np.testing.assert_array_equal, weights, back.get_weights())
    tf.nest.map_structure(
        np.testing.assert_array_equal, slots, [v.numpy() for v in back.optimizer.variables]
    )
    assert "transforms" not in back.get_config()
    back.train_on_batch(*data)
    assert int(back.optimizer.iterations) == 2


def test_stripping_says_what_is_pending():
    """Micro-batches that would be lost are counted in a warning."""
    model = ga.make_accumulating(small(optimizer="sgd", loss="mse"), 4)
    model.train_on_batch(np.ones([2, 3]), np.ones([2, 1]))
    with pytest.warns(UserWarning, match="leaves out 1 pending micro-batches"):
        ga.strip_accumulating(model)
