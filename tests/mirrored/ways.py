"""Ways to train on replicas: remainders, loops and steps of one's own, conversions."""

import cases
import feeding
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from tf_keras import layers

import ga_transform as ga
from ga_transform.models import AccumulatingModel

pytestmark = pytest.mark.usefixtures("float64")

STEPS = 2


def make(**arguments):
    inputs = tf_keras.Input([3])
    hidden = layers.Dense(4, "tanh", kernel_regularizer="l2")(inputs)
    model = tf_keras.Model(inputs, layers.Dense(2)(hidden))
    model.compile(tf_keras.optimizers.Adam(0.05), "mse", **arguments)
    return model


def batch(rng, rows):
    return rng.normal(size=[rows, 3]), rng.normal(size=[rows, 2])


def windows_of(strategy, steps, shape="uneven"):
    """Batches by window, step and replica."""
    return feeding.make_windows(batch, feeding.rows_of(strategy, shape, steps=steps))


def pair(strategy, make=make, **way):
    """A plain model, and its like under the strategy, converted."""
    plain = make()
    model = feeding.mirrored(strategy, make, plain)
    return plain, feeding.convert(strategy, model, **(way or {"accum_steps": STEPS}))


def stepping(strategy, model):
    """A loop of one's own: runs the model's step on what the replicas are given."""

    @tf.function(reduce_retracing=True)
    def run(values):
        return strategy.run(model.train_step, args=(values,))

    return lambda step: run(feeding.per_replica(strategy, step))


def train_plain(model, windows):
    model.run_eagerly = True
    for window in windows:
        model.train_on_batch(*feeding.joined(window))


# ---- what is left of a window ------------------------------------------------------------------


def test_flush(strategy):
    """An epoch's last window is applied with the weights of its own rows."""
    plain, model = pair(strategy, remainder="flush", accum_steps=STEPS)
    start = cases.weights_of(plain)
    windows = windows_of(strategy, [2, 1])
    feeding.fit(strategy, model, windows, epochs=2)
    for _ in range(2):
        train_plain(plain, windows)
    cases.assert_same_weights(model, plain, start, 1e-9)
    assert (model.pending_micro_batches, feeding.updates(model)) == (0, 4)


def test_drop(strategy):
    plain, model = pair(strategy, remainder="drop", accum_steps=STEPS)
    start = cases.weights_of(plain)
    windows = windows_of(strategy, [2, 1])
    feeding.fit(strategy, model, windows, epochs=2)
    for _ in range(2):
        train_plain(plain, windows[:1])
    cases.assert_same_weights(model, plain, start, 1e-9)
    assert (model.pending_micro_batches, feeding.updates(model)) == (0, 2)


def test_carry(strategy):
    """A window goes on in the next epoch; a batch counts once, for all replicas."""
    plain, model = pair(strategy, remainder="carry", accum_steps=STEPS)
    start = cases.weights_of(plain)
    (steps,) = windows_of(strategy, [3])
    feeding.fit(strategy, model, [steps])
    assert model.pending_micro_batches == 1
    feeding.fit(strategy, model, [steps])
    first, second, third = steps
    train_plain(plain, [[first, second], [third, first], [second, third]])
    cases.assert_same_weights(model, plain, start, 1e-9)
    assert (model.pending_micro_batches, feeding.updates(model)) == (0, 3)


def test_flush_and_discard(strategy):
    """By hand, between steps: they say how many batches were pending, and leave none."""
    plain, model = pair(strategy, accum_steps=3)
    start = cases.weights_of(plain)
    (steps,) = windows_of(strategy, [5])
    run = stepping(strategy, model)
    run(steps[0])
    assert (model.pending_micro_batches, model.discard()) == (1, 1)
    assert model.pending_micro_batches == 0
    for step in steps[1:3]:
        run(step)
    assert (model.pending_micro_batches, model.flush()) == (2, 2)
    assert (model.pending_micro_batches, model.flush()) == (0, 0)
    for step in steps[2:5]:
        run(step)
    assert model.pending_micro_batches == 0
    train_plain(plain, [steps[1:3], steps[2:5]])
    cases.assert_same_weights(model, plain, start, 1e-9)
    assert feeding.updates(model) == 2


@pytest.mark.parametrize("failing", [0, 1])
def test_a_batch_that_fails_on_one_replica(strategy, failing):
    """Windows of all replicas end together, whatever the others have stored of the batch."""
    plain, model = pair(strategy, accum_steps=3)
    start = cases.weights_of(plain)
    (steps,) = windows_of(strategy, [6], "equal")
    run = stepping(strategy, model)
    run(steps[0])
    broken = list(steps[1])
    x, y = broken.pop(failing)
    with pytest.raises(tf.errors.InvalidArgumentError):
        run([*broken[:failing], (x, y[1:]), *broken[failing:]])
    end = 4 - model.pending_micro_batches  # the first replica may have counted it
    for step in steps[1 : end + 3]:
        run(step)
    assert (model.pending_micro_batches, feeding.updates(model)) == (0, 2)
    worst = []
    for stored in ([], [broken]):
        plain = make()
        plain.set_weights(start)
        train_plain(plain, [[*steps[:end], *stored], steps[end : end + 3]])
        worst.append(max(far for _, far in cases.distances(model, plain, start)))
    assert min(worst) < 1e-9 < max(worst)


# ---- loops -------------------------------------------------------------------------------------


def test_train_on_batch(strategy):
    """tf_keras divides the batch; rows that do not divide evenly, and too few of them."""
    plain, model = pair(strategy)
    start = cases.weights_of(plain)
    rng = np.random.default_rng(0)
    replicas = strategy.num_replicas_in_sync
    batches = [batch(rng, rows) for rows in (2 * replicas, 2 * replicas + 1, 1, 3 * replicas)]
    for each in batches:
        model.train_on_batch(*each)
    for window in (batches[:2], batches[2:]):
        plain.train_on_batch(*cases.concatenate(window))
    cases.assert_same_weights(model, plain, start, 1e-9)


def test_validation_sees_the_flushed_weights(strategy):
    """What `fit` validates is the plain model's, too."""
    plain, model = pair(strategy)
    windows = windows_of(strategy, [2, 1])
    x, y = batch(np.random.default_rng(5), 4 * strategy.num_replicas_in_sync)
    ours = feeding.fit(strategy, model, windows, epochs=2, validation_data=(x, y))
    theirs = feeding.fit_plain(plain, windows, epochs=2, validation_data=(x, y))
    feeding.assert_same_logs(ours, theirs)


def test_steps_per_execution(strategy):
    """Several batches a call, which are no window."""
    plain = make()
    start = cases.weights_of(plain)
    model = feeding.mirrored(strategy, lambda: make(steps_per_execution=3), plain)
    model = feeding.convert(strategy, model, accum_steps=STEPS)
    windows = windows_of(strategy, [2, 2, 1], "empty")
    feeding.fit(strategy, model, windows)
    train_plain(plain, windows)
    cases.assert_same_weights(model, plain, start, 1e-9)


@pytest.mark.parametrize("way", feeding.WAYS)
def test_run_eagerly(strategy, way):
    way = feeding.WAYS[way]
    plain, model = pair(strategy, lambda: make(run_eagerly=True), **way)
    start = cases.weights_of(plain)
    windows = windows_of(strategy, [feeding.STEPS, 1], "empty")
    if feeding.is_split_only(way):
        windows = feeding.single(windows)
    feeding.fit(strategy, model, windows)
    train_plain(plain, windows)
    cases.assert_same_weights(model, plain, start, 1e-9)


@pytest.mark.parametrize("way", ["across", "both"])
def test_compiled_on_one_device(way):
    """A strategy of one device, with XLA."""
    way = feeding.WAYS[way]
    one = tf.distribute.MirroredStrategy(["CPU:0"])
    plain = make()
    model = feeding.convert(
        one, feeding.mirrored(one, lambda: make(jit_compile=True), plain), **way
    )
    start = cases.weights_of(plain)
    windows = [[[batch(np.random.default_rng(seed), 4)] for seed in range(feeding.STEPS)]]
    if feeding.is_split_only(way):
        windows = feeding.single(windows)
    feeding.fit(one, model, windows)
    train_plain(plain, windows)
    cases.assert_same_weights(model, plain, start, 1e-9)


# ---- steps of one's own ------------------------------------------------------------------------


class Own(tf_keras.Model):
    """Computes its loss itself, as a mean over the rows of all replicas."""

    how = "minimize"

    def __init__(self):
        super().__init__()
        self.first, self.second = layers.Dense(4, "tanh"), layers.Dense(2)
        self.build([None, 3])

    def call(self, inputs):
        return self.second(self.first(inputs))

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = tf.math.divide_no_nan(
                tf.reduce_sum((self(x, training=True) - y) ** 2), tf.cast(tf.size(y), y.dtype)
            )
            loss /= tf.distribute.get_strategy().num_replicas_in_sync
        self.update(tape, loss)
        return {"raw": loss}

    def update(self, tape, loss):
        variables = self.trainable_variables
        if self.how == "minimize":
            self.optimizer.minimize(loss, variables, tape=tape)
            return
        gradients = tape.gradient(loss, variables)
        if self.how == "apply":
            self.optimizer.apply_gradients(zip(gradients, variables))
            return
        gradients = tf.distribute.get_replica_context().all_reduce("sum", gradients)
        self.optimizer.apply_gradients(zip(gradients, variables), **{self.how: True})


class OwnApply(Own):
    how = "apply"


class OwnReduce(Own):
    how = "skip_gradients_aggregation"


def made(kind, optimizer=lambda: tf_keras.optimizers.Adam(0.05)):
    def make():
        model = kind()
        model.compile(optimizer())
        return model

    return make


@pytest.mark.parametrize("kind", [Own, OwnApply])
def test_a_step_of_ones_own(strategy, kind):
    plain, model = pair(strategy, made(kind), accum_steps=STEPS, inplace=True)
    start = cases.weights_of(plain)
    windows = windows_of(strategy, [2, 2, 1], "empty")
    feeding.fit(strategy, model, windows)
    train_plain(plain, windows)
    cases.assert_same_weights(model, plain, start, 1e-9)


def test_a_step_that_sums_its_gradients(strategy):
    """It hands each replica the sums over all of them: these count once."""
    plain, model = pair(strategy, made(OwnReduce), accum_steps=STEPS, inplace=True)
    start = cases.weights_of(plain)
    windows = windows_of(strategy, [2, 2, 1], "equal")
    feeding.fit(strategy, model, windows)
    train_plain(plain, windows)
    cases.assert_same_weights(model, plain, start, 1e-9)


class LegacyReduce(Own):
    def update(self, tape, loss):
        gradients = tape.gradient(loss, self.trainable_variables)
        gradients = tf.distribute.get_replica_context().all_reduce("sum", gradients)
        self.optimizer.apply_gradients(
            zip(gradients, self.trainable_variables), experimental_aggregate_gradients=False
        )


def test_a_step_that_sums_its_gradients_for_a_legacy_optimizer(strategy):
    make = made(LegacyReduce, lambda: tf_keras.optimizers.legacy.Adam(0.05))
    plain, model = pair(strategy, make, accum_steps=STEPS, inplace=True)
    start = cases.weights_of(plain)
    windows = windows_of(strategy, [2, 2], "equal")
    feeding.fit(strategy, model, windows)
    train_plain(plain, windows)
    cases.assert_same_weights(model, plain, start, 1e-9)


class Two(Own):
    """Two optimizers, which take turns at two losses, as those of a GAN."""

    def compile(self):
        super().compile()
        self.optimizers = [tf_keras.optimizers.Adam(0.05), tf_keras.optimizers.SGD(0.1)]

    def train_step(self, data):
        x, y = data
        logs = {}
        parts = (self.first, self.second)
        for name, sign, part, optimizer in zip("ab", (-0.1, 1.0), parts, self.optimizers):
            with tf.GradientTape() as tape:
                error = (self(x, training=True) - y) ** 2
                loss = tf.math.divide_no_nan(
                    sign * tf.reduce_sum(error), tf.cast(tf.size(y), y.dtype)
                )
                loss /= tf.distribute.get_strategy().num_replicas_in_sync
            gradients = tape.gradient(loss, part.trainable_variables)
            optimizer.apply_gradients(zip(gradients, part.trainable_variables))
            logs[name] = loss
        return logs


class TwoTogether(Two):
    """The same, of weights that rest until both have their gradients."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape(persistent=True) as tape:
            error = (self(x, training=True) - y) ** 2
            loss = tf.math.divide_no_nan(tf.reduce_sum(error), tf.cast(tf.size(y), y.dtype))
            loss /= tf.distribute.get_strategy().num_replicas_in_sync
            against = -0.1 * loss
        pairs = []
        for part, goal in ((self.first, against), (self.second, loss)):
            variables = part.trainable_variables
            pairs.append(list(zip(tape.gradient(goal, variables), variables)))
        for optimizer, pair in zip(self.optimizers, pairs):
            optimizer.apply_gradients(pair)
        return {"loss": loss}


def made_two(kind):
    def make():
        model = kind()
        model.compile()
        return model

    return make


def test_two_optimizers(strategy):
    """Each has a window of its own, which is that of all replicas."""
    plain, model = pair(strategy, made_two(TwoTogether), accum_steps=STEPS, inplace=True)
    start = cases.weights_of(plain)
    windows = windows_of(strategy, [2, 2, 1], "empty")
    feeding.fit(strategy, model, windows)
    train_plain(plain, windows)
    cases.assert_same_weights(model, plain, start, 1e-9)
    assert [int(each.iterations.numpy()) for each in model.optimizers] == [3, 3]


class TwoLosses(Two):
    """The compiled loss twice, of all rows and of some; each trains a part that is its own."""

    def compile(self):
        tf_keras.Model.compile(self, loss="mse")
        self.optimizers = [tf_keras.optimizers.Adam(0.05), tf_keras.optimizers.SGD(0.1)]

    def build(self, shape):
        super().build(shape)
        self.second.build(shape)

    def call(self, inputs):
        return self.first(inputs)

    def train_step(self, data):
        x, y = data
        some = x[:, 0] > 0
        of_all = self.first, x, tf.concat([y, y], 1)
        of_some = self.second, tf.boolean_mask(x, some), tf.boolean_mask(y, some)
        for (part, x, y), optimizer in zip((of_all, of_some), self.optimizers):
            with tf.GradientTape() as tape:
                loss = self.compiled_loss(y, part(x))
            variables = part.trainable_variables
            optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables))
        return {"loss": loss}


def test_two_compiled_losses_of_different_rows(strategy):
    """Each is weighed by its own rows on each replica, which take turns at each update."""
    plain, model = pair(strategy, made_two(TwoLosses), accum_steps=STEPS, inplace=True)
    start = cases.weights_of(plain)
    windows = windows_of(strategy, [2, 2, 1])
    feeding.fit(strategy, model, windows)
    train_plain(plain, windows)
    cases.assert_same_weights(model, plain, start, 1e-9)


def test_two_optimizers_in_turns(strategy):
    """The second sees what the first has done, where a window ends: as on one device."""
    alone, model = pair(strategy, made_two(Two), accum_steps=STEPS, inplace=True)
    ga.make_accumulating(alone, STEPS, inplace=True)
    start = cases.weights_of(alone)
    windows = windows_of(strategy, [2, 2])
    feeding.fit(strategy, model, windows)
    feeding.fit_plain(alone, feeding.single(windows))
    cases.assert_same_weights(model, alone, start, 1e-9)
    assert [int(each.iterations.numpy()) for each in model.optimizers] == [2, 2]


class Averaged(Own):
    """A moving average follows the weights, within the step."""

    def __init__(self):
        super().__init__()
        self.average = tf.train.ExponentialMovingAverage(0.5)
        self.average.apply(self.trainable_variables)

    def update(self, tape, loss):
        super().update(tape, loss)
        self.average.apply(self.trainable_variables)

    def averages(self):
        return [self.average.average(each).numpy() for each in self.trainable_variables]


def test_an_average_in_the_step(strategy):
    """It moves with the updates, and with none of the batches between."""
    plain, model = pair(strategy, made(Averaged), accum_steps=STEPS, inplace=True)
    start = cases.weights_of(plain)
    windows = windows_of(strategy, [2, 2, 1])
    for variable, value in zip(model.trainable_variables, plain.trainable_variables):
        model.average.average(variable).assign(plain.average.average(value).numpy())
    feeding.fit(strategy, model, windows)
    train_plain(plain, windows)
    cases.assert_same_weights(model, plain, start, 1e-9)
    for ours, theirs in zip(model.averages(), plain.averages()):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9)


# ---- conversions -------------------------------------------------------------------------------


def convert_outside(strategy, like):
    return ga.make_accumulating(feeding.mirrored(strategy, make, like), STEPS)


def convert_inplace(strategy, like):
    model = feeding.mirrored(strategy, make, like)
    ga.make_accumulating(model, STEPS, inplace=True)
    return model


def decorate(strategy, like):
    build = ga.accumulating(accum_steps=STEPS)(make)
    return feeding.mirrored(strategy, build, like)


CONVERSIONS = {each.__name__: each for each in (convert_outside, convert_inplace, decorate)}


@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_conversions(strategy, conversion):
    """The copy, too, is under the strategy."""
    plain = make()
    start = cases.weights_of(plain)
    model = CONVERSIONS[conversion](strategy, plain)
    assert isinstance(model, AccumulatingModel)
    assert model.distribute_strategy is strategy
    windows = windows_of(strategy, [2, 1])
    feeding.fit(strategy, model, windows)
    train_plain(plain, windows)
    cases.assert_same_weights(model, plain, start, 1e-9)
    feeding.assert_mirrored(model)


def test_the_way_back(strategy):
    """A stripped model is a plain one under the strategy, which trains on."""
    plain, model = pair(strategy)
    start = cases.weights_of(plain)
    windows = windows_of(strategy, [2, 2], "equal")
    feeding.fit(strategy, model, windows)
    train_plain(plain, windows)
    stripped = ga.strip_accumulating(model)
    assert not isinstance(stripped, AccumulatingModel)
    assert stripped.distribute_strategy is strategy
    single = feeding.single(windows)
    feeding.fit(strategy, stripped, single)
    train_plain(plain, single)
    cases.assert_same_weights(stripped, plain, start, 1e-9)
    assert feeding.updates(stripped) == feeding.updates(plain)


@pytest.mark.parametrize("way", ["across", "both"])
def test_replicas_that_are_not_brought_together(strategy, way, monkeypatch):
    """As on TPUs, and on GPUs whose steps are compiled: each replica exchanges by itself."""
    monkeypatch.setattr(strategy.extended, "_use_merge_call", lambda: False)
    make, batch = feeding.maker("dense", cases.OPTIMIZERS["adam"])
    windows = feeding.make_windows(batch, feeding.rows_of(strategy, "empty"))
    feeding.assert_law(strategy, make, windows, feeding.WAYS[way])


@pytest.mark.parametrize("way", ["across", "both"])
def test_the_log_of_updates(strategy, way, tmp_path):
    """Norms and shares are those of all replicas together; a batch counts once, and so do rows."""
    clip = {**feeding.WAYS[way], "agc": 0.5}
    plain, model = pair(strategy, **clip)
    start = plain.get_weights()
    one_device = ga.make_accumulating(plain, agc=0.5)
    windows = windows_of(strategy, [feeding.STEPS, 1])
    log = ga.AccumulationLog(csv=tmp_path / "log.csv", tensorboard=tmp_path)
    ours = feeding.fit(strategy, model, windows, callbacks=[log])
    rows = (tmp_path / "log.csv").read_text().splitlines()[1:]
    assert [row.split(",")[1] for row in rows] == ["1", "2"]
    theirs = feeding.fit_plain(one_device, windows, callbacks=[ga.AccumulationLog()])
    assert max(np.max(np.abs(a - b)) for a, b in zip(start, one_device.get_weights())) > 1e-4
    assert ours["updates"] == theirs["updates"] == [2]
    for name in ("gradient_norm", "clipped_gradient_norm", "clipped_share"):
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-9)
    assert (ours["partial_windows"], theirs["partial_windows"]) == ([1], [0])
    if way == "across":
        assert ours["micro_batches_per_update"] == [(feeding.STEPS + 1) / 2]


def test_the_law_on_a_model_of_replicas(strategy):
    """`verify_equivalence` compares with large batches in which each row counts alike."""
    _, model = pair(strategy)
    x, y = batch(np.random.default_rng(3), 6 * strategy.num_replicas_in_sync + 1)
    assert ga.verify_equivalence(model, x, y, updates=2).largest < 1e-9
    _, split = pair(strategy, micro_batch_size=1)
    assert ga.verify_equivalence(split, x, y, updates=2).largest < 1e-9
