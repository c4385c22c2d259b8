"""Models of people's own classes, with their own `train_step`, losses and optimizers."""

import cases
import numpy as np
import own_models
import pytest
import tensorflow as tf
import tf_keras

import ga_transform as ga


def fit(model, batches, epochs=2):
    return model.fit(cases.dataset(batches), epochs=epochs, verbose=0)


def optimizers_of(model):
    """Those that were handed gradients, by the name of the attribute."""
    return {
        name: value
        for name, value in vars(model).items()
        if isinstance(value, tf_keras.optimizers.Optimizer)
    }


def assert_same_weights(model, plain):
    """All weights but those of metrics, which see other batches."""
    logged = {v.ref() for metric in plain.metrics for v in metric.variables}
    for ours, theirs in zip(model.weights, plain.weights):
        if theirs.ref() not in logged:
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9, err_msg=theirs.name)


@pytest.mark.parametrize("case", own_models.LAW)
def test_the_law(float64, case):
    """Whatever a model does in its step: the weights of the large batch, and its own logs."""
    build, batch = own_models.LAW[case]
    plain, model = build(), ga.make_accumulating(build(), cases.STEPS, inplace=True)
    windows = cases.batches_of(batch, cases.PARTIAL)
    theirs = fit(plain, map(cases.concatenate, windows))
    ours = fit(model, sum(windows, []))
    assert_same_weights(model, plain)
    assert theirs.history.keys() == ours.history.keys()
    for name, optimizer in optimizers_of(plain).items():
        assert int(vars(model)[name].iterations) == int(optimizer.iterations), name
    assert type(ga.strip_accumulating(model, inplace=True)) is type(plain)


@pytest.mark.parametrize(
    "how",
    [
        {"run_eagerly": True},
        pytest.param({"jit_compile": True}, marks=pytest.mark.long),
        {"steps_per_execution": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("case", ["minimize", "apply_gradients", "moving average"])
def test_every_way_to_run_a_step(float64, case, how):
    """Eagerly, compiled by XLA, and several batches a call."""
    build, batch = own_models.LAW[case]
    models = []
    for _ in range(2):
        model = build()
        model.compile(model.optimizer, model.compiled_loss._user_losses, **how)
        models.append(model)
    plain, model = models
    ga.make_accumulating(model, cases.STEPS, inplace=True)
    windows = cases.batches_of(batch, cases.PARTIAL)
    fit(plain, map(cases.concatenate, windows))
    fit(model, sum(windows, []))
    assert_same_weights(model, plain)
    for name, optimizer in optimizers_of(plain).items():
        assert int(vars(model)[name].iterations) == int(optimizer.iterations), name


def test_a_moving_average_moves_with_the_weights(float64):
    """`tf.train.ExponentialMovingAverage` in a step, before its optimizer or after it."""
    build, batch = own_models.LAW["moving average"]
    plain, model = build(), ga.make_accumulating(build(), cases.STEPS, inplace=True)
    windows = cases.batches_of(batch, cases.PARTIAL)
    fit(plain, map(cases.concatenate, windows))
    fit(model, sum(windows, []))
    for ours, theirs in zip(model.trainable_variables, plain.trainable_variables):
        for name in ("average", "before"):
            moved, expected = vars(model)[name].average(ours), vars(plain)[name].average(theirs)
            np.testing.assert_allclose(moved, expected, rtol=0, atol=1e-9)
            assert np.max(np.abs(expected - theirs)) > 1e-4


def test_the_law_could_fail(float64):
    """The models of these tests move: two windows more, and the weights differ."""
    build, batch = own_models.LAW["minimize"]
    once, twice = build(), build()
    windows = cases.batches_of(batch, cases.PARTIAL)
    fit(once, map(cases.concatenate, windows), epochs=1)
    fit(twice, map(cases.concatenate, windows), epochs=2)
    with pytest.raises(AssertionError):
        assert_same_weights(once, twice)


def test_a_schedule_counts_the_updates_of_an_optimizer_without_a_count(float64):
    """An optimizer that is made of others, and has no `iterations`, has a schedule too."""
    build, batch = own_models.LAW["router of its own"]
    plain, model = build(), ga.make_accumulating(build(), {0: 1, 2: 3}, inplace=True)
    windows = cases.batches_of(batch, [[3], [2], [1, 2, 3], [2, 2]])
    fit(plain, map(cases.concatenate, windows), epochs=1)
    fit(model, sum(windows, []), epochs=1)
    assert_same_weights(model, plain)


def test_each_optimizer_counts_its_own_micro_batches(float64):
    """Where only one of two optimizers is called in a step, the windows of both are exact."""
    plain = own_models.adversaries(own_models.Phases)
    model = own_models.adversaries(own_models.Phases)
    ga.make_accumulating(model, 2, inplace=True)
    batches = sum(
        cases.batches_of(own_models.features, [[4, 1, 6, 2, 5, 3, 2, 4, 3, 1, 5, 2, 3, 3]]), []
    )
    for network in (plain.generator, plain.critic):
        network.build([None, 4])
    held = {0: [], 1: []}
    for position, x in enumerate(batches):
        which = int((position + 1) % 3 == 0)
        network = (plain.critic, plain.generator)[which]
        optimizer = (plain.critic_optimizer, plain.generator_optimizer)[which]
        with tf.GradientTape() as tape:
            loss = plain.losses_of(x)[which]
        held[which].append((len(x), tape.gradient(loss, network.trainable_variables)))
        if len(held[which]) == 2 or position + 1 == len(batches):
            rows = sum(rows for rows, _ in held[which])
            means = [
                sum(count * g for (count, _), g in zip(held[which], gradients)) / rows
                for gradients in zip(*[gradients for _, gradients in held[which]])
            ]
            optimizer.apply_gradients(zip(means, network.trainable_variables))
            held[which].clear()
    model.fit(cases.dataset(batches), verbose=0)
    assert_same_weights(model.critic, plain.critic)
    assert_same_weights(model.generator, plain.generator)
    assert int(model.critic_optimizer.iterations) == 5
    assert int(model.generator_optimizer.iterations) == 2


def test_what_can_be_read_of_the_optimizer_is_true(float64):
    """Within a step: the count of updates, the learning rate and the slots of plain training."""

    class Reading(own_models.TwoLayers):
        def train_step(self, data):
            result = super().train_step(data)
            optimizer = self.optimizer
            slots = [variable.name for variable in optimizer.variables]
            rate = float(optimizer.learning_rate)
            seen.append((int(optimizer.iterations), rate, slots, optimizer.get_config()))
            return result

    windows = cases.batches_of(own_models.regression, [[2, 2], [2, 2], [3, 1]])
    reads = []
    for convert in (False, True):
        seen = []
        tf_keras.backend.clear_session()
        model = Reading()
        rate = tf_keras.optimizers.schedules.PiecewiseConstantDecay([1], [0.5, 0.25])
        optimizer = tf_keras.optimizers.SGD(rate, momentum=0.9)
        model.compile(optimizer, "mse", run_eagerly=True)
        if convert:
            ga.make_accumulating(model, 2, inplace=True)
        fit(model, sum(windows, []) if convert else map(cases.concatenate, windows), epochs=1)
        reads.append(seen)
    plain, ours = reads
    assert ours[1::2] == plain
    assert [count for count, *_ in ours] == [0, 1, 1, 2, 2, 3]


def test_a_training_function_without_a_step_is_named():
    """Where `make_train_function` does it all, there is nothing to accumulate; a warning says so."""

    class Bypass(own_models.TwoLayers):
        def make_train_function(self):
            def step(iterator):
                x, y = next(iterator)
                with tf.GradientTape() as tape:
                    loss = own_models.mean_square(y, self(x))
                self.optimizer.minimize(loss, self.trainable_variables, tape=tape)
                return {"loss": loss}

            return step

    model = Bypass()
    model.compile("sgd")
    ga.make_accumulating(model, 2, inplace=True)
    with pytest.warns(ga.InexactWarning, match="does not call train_step"):
        model.fit(*own_models.regression(np.random.default_rng(0), 4), verbose=0)
