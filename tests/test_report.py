"""explain and verify_equivalence: what is said of a model is so, and nothing of it changes."""

import attrs
import cases
import numpy as np
import own_models
import pytest
import tensorflow as tf
import tf_keras
from tf_keras import layers

import ga_transform as ga


def rows(count=50, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=[count, 4]), rng.normal(size=[count, 1])


def sequential(*between, loss="mse", optimizer="adam", **arguments):
    tf_keras.utils.set_random_seed(1)
    model = tf_keras.Sequential(
        [tf_keras.Input([4]), layers.Dense(6, "tanh"), *between, layers.Dense(1)], name="small"
    )
    model.compile(optimizer, loss, **arguments)
    return model


def eager(*between, optimizer="sgd", **arguments):
    """A model whose copies need not be traced, which takes longer than to train them."""
    return sequential(*between, optimizer=optimizer, run_eagerly=True, **arguments)


def converted(model, **arguments):
    """Converted, without the warnings that say what `explain` says."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *args, **kwargs: None)
        return ga.make_accumulating(model, **(arguments or {"accum_steps": 4}))


def verdicts(model):
    """By subject, the verdict and the names of each finding."""
    return {each.subject: (each.verdict, each.names) for each in ga.explain(model).findings}


def subjects(report):
    """What a trial has found to be the causes."""
    return [each.subject for each in report.causes]


# ---- explain -----------------------------------------------------------------------------------


def test_explain_prints_window_stages_memory_and_findings():
    """All of a small model, as a person reads it."""
    model = converted(sequential(layers.Dropout(0.5)), accum_steps={0: 1, 10: 4}, agc=0.02)
    assert str(ga.explain(model)).splitlines() == [
        "small: Chain(Accumulate(steps={0: 1, 10: 4}) -> ClipByAGC(clip_factor=0.02))",
        "",
        "window  an update every batch from update 0 on, 4 batches from update 10 on; a partial window at the",
        "        end of an epoch is applied with its own weights",
        "stage   ClipByAGC(clip_factor=0.02): on the mean gradient of the window",
        "memory  148 bytes of sums",
        "",
        "outside      random numbers (dropout): micro-batches draw other numbers than the large batch, of the",
        "             same distribution",
        "exact        compiled losses (mse): each micro-batch weighs what its mean divided by; sums are added",
        "             up",
        "exact        optimizer (Adam): it sees updates, and counts nothing else",
    ]


def test_a_model_of_dense_layers_is_exact():
    """Nothing else is said of it, and `is_exact` says so."""
    explanation = ga.explain(converted(sequential()))
    assert {each.verdict for each in explanation.findings} == {"exact"}
    assert explanation.is_exact
    assert not ga.explain(converted(sequential(layers.Dropout(0.5)))).is_exact


def test_every_batch_an_update_is_exact():
    """Without windows, whatever couples rows is what it was."""
    model = converted(sequential(layers.BatchNormalization()), agc=True)
    assert verdicts(model) == {"windows": ("exact", ())}
    assert ga.explain(model).memory == 0


def test_memory_is_that_of_the_sums():
    """Before training it is foretold, then measured; slices are as large as the rows touched."""
    model = converted(sequential())
    foretold = ga.explain(model).memory
    assert foretold == 4 * sum(np.prod(each.shape) for each in model.trainable_variables)
    model.train_on_batch(*rows(4))
    assert ga.explain(model).memory == foretold

    words = cases.words()
    words.model.compile("sgd", **words.compile)
    model = converted(words.model)
    (table,) = [each.name for each in model.layers if isinstance(each, layers.Embedding)]
    assert ga.explain(model).sparse == (table,)
    assert ga.explain(model).memory == 4 * (3 + 1)
    model.train_on_batch(*words.batch(np.random.default_rng(0), 2))
    touched = ga.explain(model).memory - 4 * (3 + 1)
    assert 2 * 4 * 3 * 4 <= touched <= 9 * 3 * 4 + 100


def test_memory_that_is_not_known_is_not_foretold():
    """It may be more of tables and of sums beside means, and is anything before there is a model."""

    def memory_of(model):
        return next(line for line in str(ga.explain(model)).splitlines() if "memory" in line)

    model = unbuilt()
    assert memory_of(model) == "memory  not known before the model is built"
    assert ga.explain(model).memory is None
    assert verdicts(model)["layers"][0] == "depends"
    loss = tf_keras.losses.MeanSquaredError(reduction="sum")
    model = converted(sequential(layers.ActivityRegularization(l2=0.1), loss=loss))
    foretold = ga.explain(model)
    assert memory_of(model) == f"memory  at least {foretold.memory} bytes of sums"
    model.train_on_batch(*rows(4))
    assert ga.explain(model).memory > foretold.memory
    assert "at least" not in memory_of(model)
    words = cases.words()
    words.model.compile("sgd", **words.compile)
    assert memory_of(converted(words.model)).startswith("memory  at least 16 bytes of sums; and")


@pytest.mark.parametrize("mode", ["keep", "momentum", "pooled", "freeze"])
def test_batch_norm_is_named(mode):
    """Outside of the law but where it is frozen, with what its statistics do."""
    model = converted(sequential(layers.BatchNormalization(name="norm")), accum_steps=4,
                      batch_norm=mode)  # fmt: skip
    expected = "exact" if mode == "freeze" else "outside"
    assert verdicts(model)["batch normalisation"] == (expected, ("norm",))
    model.get_layer("norm").trainable = False
    assert verdicts(model)["batch normalisation"] == ("exact", ("norm",))


@pytest.mark.parametrize(
    ("layer", "is_random"),
    [
        (layers.Dropout(0.1), True),
        (layers.Dropout(0.0), False),
        (layers.GaussianNoise(0.1), True),
        (layers.Reshape([1, 6]), False),
    ],
)
def test_layers_that_draw_random_numbers_are_named(layer, is_random):
    """Those that do, and not those whose rate is zero."""
    found = verdicts(converted(sequential(layer)))
    assert ("random numbers" in found) == is_random
    if is_random:
        assert found["random numbers"] == ("outside", (layer.name,))


def test_recurrent_dropout_is_named_once():
    """By the layer, not by its cell; and not where there is none."""
    inputs = tf_keras.Input([None, 4])
    hidden = layers.LSTM(3, recurrent_dropout=0.1, name="random", return_sequences=True)(inputs)
    model = tf_keras.Model(inputs, layers.GRU(1, name="quiet")(hidden))
    model.compile("sgd", "mse")
    assert verdicts(converted(model))["random numbers"] == ("outside", ("random",))


def test_losses_are_told_apart():
    """Those of tf_keras, those of others, and those that are known to couple rows."""

    def own(y_true, y_pred):
        return tf.reduce_mean(tf.square(y_true - y_pred), -1)

    assert verdicts(converted(sequential(loss=own)))["losses from outside tf_keras"] == (
        "depends",
        ("own",),
    )
    metric = tf_keras.metrics.MeanSquaredError()
    found = verdicts(converted(sequential(loss=metric)))
    assert found["losses that couple rows"] == ("outside", ("MeanSquaredError of tf_keras",))


def test_a_loss_of_the_whole_batch_is_recommended_and_exact():
    """Where a loss may couple rows, the way that is exact is named with its price."""

    def own(y_true, y_pred):
        return tf.math.reduce_variance(y_true - y_pred)

    def found(loss, **way):
        findings = ga.explain(converted(sequential(loss=loss), **way)).findings
        return {each.subject: each for each in findings}

    whole = {"micro_batch_size": 4, "whole_batch_loss": True}
    remedy = (
        "micro_batch_size with whole_batch_loss=True is exact for every loss of the outputs, for"
    )
    for loss, subject in (
        (own, "losses from outside tf_keras"),
        (tf_keras.metrics.MeanSquaredError(), "losses that couple rows"),
    ):
        assert f"{remedy} one forward pass more" in found(loss, accum_steps=4)[subject].remedy
        of_window = found(loss, accum_steps=2, **whole)[subject]
        assert of_window.verdict != "exact"
        assert "without accum_steps a batch is a window" in of_window.remedy
        assert subject not in found(loss, **whole)
    assert found(own, **whole)["losses of the whole batch"].names == ("own",)
    assert ga.explain(converted(sequential(loss=own), **whole)).is_exact
    model = converted(eager(loss=own), **whole)
    assert ga.verify_equivalence(model, *rows(20)).is_exact


WEIGHTINGS = {
    "equal": ("equal", "depends"),
    "sum": ("sum", "outside"),
    "function": (lambda data: 1.0, "depends"),
}


@pytest.mark.parametrize("case", WEIGHTINGS)
def test_weightings_that_were_asked_for_are_named(case):
    """None but "exact" is exact for the compiled loss; of a sum, all are."""
    weighting, verdict = WEIGHTINGS[case]
    chain = [ga.Accumulate(4, weighting=weighting)]
    found = verdicts(converted(sequential(), transforms=chain))
    assert found["weighting"][0] == verdict
    assert "compiled losses" not in found
    loss = tf_keras.losses.MeanSquaredError(reduction="sum")
    assert "weighting" not in verdicts(converted(sequential(loss=loss), transforms=chain))


def test_a_loss_of_the_models_own_is_told_what_its_weighting_says():
    """With "sum" it is to be a sum, with a function a mean over what that counts."""

    class Own(tf_keras.Sequential):
        def train_step(self, data):
            return super().train_step(data)

    def tokens(data):
        return 1.0

    for weighting, told, is_to_mend in (
        ("exact", "a mean over something else", True),
        ("sum", "if its loss is a sum over rows", False),
        (tokens, "a mean over what tokens counts", False),
    ):
        model = Own([tf_keras.Input([4]), layers.Dense(1)])
        model.compile("sgd", "mse")
        model = converted(model, transforms=[ga.Accumulate(4, weighting=weighting)])
        findings = {each.subject: each for each in ga.explain(model).findings}
        assert told in findings["train_step of the model's own"].why
        assert bool(findings["train_step of the model's own"].remedy) == is_to_mend
        assert "weighting" not in findings


def test_code_of_the_users_own_is_named():
    """Layers and metrics whose code is not known are exact under a condition."""

    class Own(layers.Dense):
        def call(self, inputs):
            return tf.nn.dropout(super().call(inputs), 0.1)

    class Derived(layers.Dense):
        pass

    def metric(y_true, y_pred):
        return tf.reduce_max(y_pred)

    model = sequential(Own(3), Own(2), Derived(2), layers.Lambda(abs, name="function"))
    model.compile("sgd", "mse", metrics=["mae", tf_keras.metrics.MeanSquaredError(), metric])
    found = verdicts(converted(model))
    assert found["layers from outside tf_keras"] == ("depends", ("Own", "function"))
    assert found["metrics from outside tf_keras"] == ("depends", ("metric",))


def stateful():
    inputs = tf_keras.Input(batch_shape=[5, 3, 4])
    hidden = layers.LSTM(3, stateful=True, name="chain")(inputs)
    model = tf_keras.Model(inputs, layers.Dense(1)(hidden))
    model.compile("sgd", "mse")
    return converted(model)


def test_states_are_named():
    """A micro-batch goes on from the one before, which no large batch does."""
    assert verdicts(stateful())["states"] == ("outside", ("chain",))


def test_masks_that_differ_by_output_are_named():
    """One number weighs a micro-batch; where all outputs have one mask, that is exact."""
    inputs = tf_keras.Input([None], dtype="int32")
    hidden = layers.Embedding(9, 3, mask_zero=True)(inputs)
    tags = layers.Dense(3, name="tags")(hidden)
    also = layers.Dense(3, name="also")(hidden)
    score = layers.Dense(1, name="score")(layers.GlobalAveragePooling1D()(hidden))
    subject = "outputs whose masks or lengths differ"
    for outputs, expected in (
        ([tags, score], ("approximate", ("tags", "score"))),
        ([tags, also], None),
    ):
        model = tf_keras.Model(inputs, outputs)
        model.compile("sgd", "mse")
        found = verdicts(converted(model))
        assert found.get(subject) == expected
        assert ("compiled losses" in found) == (expected is None)


def test_optimizers_are_named():
    """Wrapped ones with what they wrap, and those that are exact under a condition."""
    scaled = tf_keras.mixed_precision.LossScaleOptimizer(tf_keras.optimizers.SGD())
    assert verdicts(converted(sequential(optimizer=scaled)))["optimizer"] == (
        "exact",
        (f"{type(scaled).__name__} of SGD",),
    )
    found = verdicts(converted(sequential(optimizer=tf_keras.optimizers.Nadam())))
    assert found["optimizer"] == ("approximate", ("Nadam",))
    words = cases.words()
    words.model.compile(tf_keras.optimizers.SGD(clipnorm=1.0), **words.compile)
    assert verdicts(converted(words.model))["optimizer"][0] == "approximate"


def test_stages_before_accumulate_are_named():
    """They act on micro-batches, which the large batch has none of."""
    model = converted(sequential(), transforms=[ga.ClipByNorm(1.0), ga.Accumulate(4)])
    assert verdicts(model)["stages before Accumulate"] == ("outside", ("ClipByNorm",))
    assert ga.explain(model).stages == (
        "ClipByNorm(max_norm=1.0): on the gradient of each micro-batch",
    )


def test_what_training_has_warned_of_is_told():
    """A loss that comes as one number is known after a step."""

    class Reduced(own_models.TwoLayers):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
            loss = own_models.mean_square(y, y_pred)[tf.newaxis]
            return self.compiled_loss(loss, loss)

    model = Reduced()
    model.compile("sgd", lambda y_true, y_pred: y_pred)
    ga.make_accumulating(model, 2, inplace=True)
    with pytest.warns(ga.InexactWarning, match="read as a mean over rows"):
        model.train_on_batch(*own_models.regression(np.random.default_rng(0), 3))
    assert verdicts(model)["found in training"][0] == "approximate"


def test_only_converted_models_are_explained():
    with pytest.raises(TypeError, match=r"^explain\.model must be a converted model; got <"):
        ga.explain(sequential())


# ---- verify_equivalence ------------------------------------------------------------------------


WAYS = {
    "across": {"accum_steps": 4},
    "split": {"micro_batch_size": 3},
    "both": {"accum_steps": 2, "micro_batch_size": 3},
    "schedule": {"accum_steps": {0: 1, 1: 3}},
    "clipped": {"accum_steps": 4, "agc": 0.001},
}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_exact_is_found_to_be_so(float64, way):
    """In float64 to 1e-9, for windows of every kind; uneven ones, because 50 rows do not divide."""
    model = converted(sequential(), **WAYS[way])
    report = ga.verify_equivalence(model, *rows())
    assert report.largest < 1e-9
    assert report.is_exact
    assert not report.causes
    assert sum(map(sum, report.windows)) == 50
    assert "the same but for rounding" in str(report)


@pytest.mark.parametrize("case", WEIGHTINGS)
def test_a_wrong_weighting_is_found(case):
    """Micro-batches that weigh something else than their rows make the difference, and are named."""
    chain = [ga.Accumulate(4, weighting=WEIGHTINGS[case][0])]
    model = converted(eager(), transforms=chain)
    report = ga.verify_equivalence(model, *rows(), updates=1)
    assert not report.is_exact
    assert subjects(report) == ["weighting"]
    assert "NOT the same" in str(report)
    assert "mend:  weighting='exact'" in str(report)
    assert max(each.relative for each in report.variables) == report.largest


NOTHING = {
    "NaN": ({"accum_steps": 2}, 0.1, np.nan, "gradients that are not finite"),
    "skipped": ({"accum_steps": 2, "agc": True}, 0.1, np.nan, "gradients that are not finite"),
    "at rest": ({"accum_steps": 2}, 0.0, 0.0, "no update"),
}


@pytest.mark.parametrize("case", NOTHING)
def test_nothing_is_exact_where_nothing_was_compared(case):
    """Not with a NaN in a copy, nor if both have skipped an update, nor if no weight has moved."""
    arguments, learning_rate, value, subject = NOTHING[case]
    model = eager(optimizer=tf_keras.optimizers.SGD(learning_rate))
    model.layers[0].trainable = False  # its difference of zero comes before a NaN
    x, y = rows(8)
    y[3] += value
    report = ga.verify_equivalence(converted(model, **arguments), x, y, updates=1)
    assert not report.is_exact
    assert subjects(report) == [subject]
    assert "the same but for rounding" not in str(report)


def test_16_bits_are_tried_in_float32():
    """So what is exact is so to 1e-3, be the loss scale too high, and what is not is found."""
    precision = ga.Precision("mixed_float16", initial_scale=2.0**20)  # which skips at first
    model = converted(eager(), accum_steps=2, precision=precision)
    report = ga.verify_equivalence(model, *rows(20), updates=1)
    assert report.is_exact
    assert report.largest < 1e-4 < report.of_16_bits < 0.1
    assert "tried in float32, from where 16 bits differ by" in str(report)
    model = converted(eager(layers.Dropout(0.05)), accum_steps=2, precision="mixed_bfloat16")
    report = ga.verify_equivalence(model, *rows(50), updates=1)
    assert subjects(report) == ["random numbers"]
    assert report.of_16_bits is None


def test_rounding_that_an_optimizer_enlarges_does_not_count():
    """Of a bias before a normalisation it makes steps of any sign; what else differs is found."""

    def normalised():
        tf_keras.utils.set_random_seed(1)
        between = [layers.Dense(6, name="moot"), layers.GroupNormalization(6)]
        ends = [layers.GlobalMaxPooling1D(), layers.Dense(1)]
        model = tf_keras.Sequential([tf_keras.Input([5, 4]), *between, *ends])
        model.compile("adam", "mse", run_eagerly=True)
        return model

    x, y = np.random.default_rng(0).normal(size=[50, 5, 4]), rows()[1]
    report = ga.verify_equivalence(converted(normalised()), x, y, updates=2)
    assert report.is_exact
    uncounted = [each.name for each in report.variables if each.uncounted]
    assert uncounted == ["moot/bias:0"]
    assert "not counted: rounding, which Adam enlarges in moot/bias:0" in str(report)
    wrong = converted(normalised(), transforms=[ga.Accumulate(4, weighting="equal")])
    assert subjects(ga.verify_equivalence(wrong, x, y, updates=2)) == ["weighting"]


def test_what_stays_without_suspects_is_said():
    """Dropout is not blamed alone for what an operation of TensorFlow does."""
    inputs = tf_keras.Input([4])
    hidden = layers.Dropout(0.01)(inputs - tf.reduce_mean(inputs, 0))
    model = tf_keras.Model(inputs, layers.Dense(1)(hidden))
    model.compile("sgd", "mse", run_eagerly=True)
    report = ga.verify_equivalence(converted(model), *rows(), updates=1)
    assert subjects(report) == ["not found out", "random numbers"]
    assert report.causes[0].why.startswith("the difference stays without random numbers; ")


def test_copies_are_given_one_batch_at_a_time():
    """However many a call of the model's own training function takes."""
    model = sequential(optimizer="sgd", steps_per_execution=4)
    assert ga.verify_equivalence(converted(model), *rows(), updates=1).is_exact


def test_a_schedule_is_read_under_a_strategy():
    """Where the count of updates is a variable of replicas."""
    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        model = converted(eager(), accum_steps={0: 1, 1: 3})
    report = ga.verify_equivalence(model, *rows(20), updates=2)
    assert report.is_exact
    assert list(map(len, report.windows)) == [1, 3]


@pytest.mark.parametrize(
    ("between", "named"),
    [
        ([layers.Dropout, 0.5], ["random numbers"]),
        ([layers.BatchNormalization], ["batch normalisation"]),
        ([layers.Dropout, 0.5, layers.BatchNormalization], ["batch normalisation", "random numbers"]),
        ([layers.GaussianNoise, 1e-12, layers.BatchNormalization], ["batch normalisation"]),
    ],
    ids=["dropout", "batch norm", "both", "next to no noise"],
)  # fmt: skip
def test_causes_are_named_when_they_are(between, named):
    """Dropout and batch normalisation, each if the difference is there without the other."""
    made = []
    for item in between:
        if isinstance(item, type):
            made.append([item])
        else:
            made[-1].append(item)
    made = [kind(*arguments) for kind, *arguments in made]
    model = sequential(*made, run_eagerly=len(made) > 1)  # two take many copies
    report = ga.verify_equivalence(converted(model, accum_steps=2), *rows(20), updates=2)
    assert not report.is_exact
    assert sorted(subjects(report)) == named


def test_sample_weights_and_structures(float64):
    """Dicts of inputs and outputs, and weights of rows."""
    case = cases.branches()
    case.model.compile("sgd", **case.compile)
    x, y = case.batch(np.random.default_rng(0), 30)
    report = ga.verify_equivalence(converted(case.model), x, y, updates=2)
    assert report.largest < 1e-9
    case = cases.dense()
    case.model.compile("sgd", **case.compile)
    data = case.batch(np.random.default_rng(0), 30)
    assert ga.verify_equivalence(converted(case.model), *data, updates=2).largest < 1e-9


def test_an_output_may_have_no_sample_weights():
    """As for `fit`, of several."""
    inputs = tf_keras.Input([4])
    model = tf_keras.Model(inputs, [layers.Dense(1)(inputs), layers.Dense(1)(inputs)])
    model.compile("sgd", "mse", run_eagerly=True)
    x, y = rows(8)
    weights = [np.arange(8.0), None]
    model = converted(model, accum_steps=2)
    assert ga.verify_equivalence(model, x, [y, y], weights, updates=1).is_exact


def test_the_model_is_not_touched(float64):
    """Weights, optimizer, a pending window and the trace of its step stay as they are."""
    model = converted(sequential())
    x, y = rows()
    model.train_on_batch(x[:3], y[:3])
    before = [each.numpy() for each in (*model.weights, *model.optimizer.variables)]
    step = model.train_function
    ga.verify_equivalence(model, x, y, updates=1)
    after = [each.numpy() for each in (*model.weights, *model.optimizer.variables)]
    for one, other in zip(before, after):
        np.testing.assert_array_equal(one, other)
    assert model.pending_micro_batches == 1
    assert model.train_function is step


REFUSED = {
    "plain": (lambda: (sequential(), *rows()), TypeError, r"model must be a converted model"),
    "rows": (
        lambda: (converted(sequential()), *rows(11)),
        ValueError,
        r"x must have at least 12 rows for 3 updates of Chain\(.*\); got 11\. Pass more rows",
    ),
    "no slices": (
        lambda: (converted(sequential(), micro_batch_size=8), *rows(26)),
        ValueError,
        r"x must have at least 27 rows",
    ),
    "differ": (
        lambda: (converted(sequential()), rows(20)[0], rows(30)[1]),
        ValueError,
        r"must have as many rows each; got shapes \(20, 4\) \(tuple\), \(30, 1\) \(tuple\)",
    ),
    "dataset": (
        lambda: (converted(sequential()), tf.data.Dataset.range(3)),
        TypeError,
        r"must be arrays or tensors of rows; got <_RangeDataset .*Of a dataset, pass the rows",
    ),
    "nothing": (
        lambda: (converted(sequential()), None),
        TypeError,
        r"must be arrays or tensors of rows; got None",
    ),
    "scalar": (
        lambda: (converted(sequential()), rows(20)[0], np.float32(1)),
        TypeError,
        r"must be arrays or tensors of rows; got .*\(float32\)",
    ),
    "stateful": (
        lambda: (stateful(), np.zeros([20, 3, 4]), np.zeros([20, 1])),
        ValueError,
        r"model must have no stateful layers; got chain in ",
    ),
    "not built": (
        lambda: (unbuilt(), *rows()),
        ValueError,
        r"model must be compiled and built; got '.*', which is not",
    ),
    "not copied": (
        lambda: (own_class(), *rows()),
        ValueError,
        r"model must be one that can be copied; got .*get_config",
    ),
}


def unbuilt():
    model = tf_keras.Sequential([layers.Dense(1)])
    model.compile("sgd", "mse")
    return converted(model)


def own_class():
    class Bare(tf_keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(1)

        def call(self, x):
            return self.dense(x)

    model = Bare()
    model.compile("sgd", "mse")
    model(rows(1)[0])
    return ga.make_accumulating(model, 4, inplace=True)


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_verified_is_refused(case):
    """On one line that says what to pass."""
    arguments, error, text = REFUSED[case]
    with pytest.raises(error, match=rf"^verify_equivalence\..*{text}") as raised:
        ga.verify_equivalence(*arguments())
    assert "\n" not in str(raised.value)
    assert "inplace" not in str(raised.value)


def test_reports_are_data():
    """They compare, and cannot be changed."""
    model = converted(sequential())
    assert ga.explain(model) == ga.explain(model)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        ga.explain(model).memory = 0
