"""Models of people's own, each with the ways of training that `fit` leaves to them.

A case is a function that returns a compiled model, the same one at each call, and a batch of
so many rows. What a model logs or counts for itself is part of the law as well.
"""

import tensorflow as tf
import tf_keras
from tf_keras import layers

optimizers = tf_keras.optimizers
legacy = tf_keras.optimizers.legacy


def dense(units, activation=None, seed=0, **kwargs):
    """A layer that starts the same wherever and whenever it is built."""
    start = tf_keras.initializers.GlorotUniform(seed)
    return layers.Dense(units, activation, kernel_initializer=start, **kwargs)


def momentum():
    return optimizers.SGD(0.1, momentum=0.9)


def regression(rng, rows):
    return rng.normal(size=[rows, 4]), rng.normal(size=[rows, 2])


def features(rng, rows):
    return rng.normal(size=[rows, 4])


class TwoLayers(tf_keras.Model):
    """Subclassed, built at its first batch."""

    def __init__(self, width=5, **kwargs):
        super().__init__(**kwargs)
        self.hidden = dense(width, "tanh", kernel_regularizer="l2")
        self.top = dense(2)

    def call(self, x, training=False):
        return self.top(self.hidden(x))


def mean_square(y, y_pred):
    return tf.reduce_mean(tf.square(tf.cast(y, y_pred.dtype) - y_pred))


class Minimize(TwoLayers):
    """`minimize` with a tape, a loss tracker and a result of its own."""

    def __init__(self):
        super().__init__()
        self.tracker = tf_keras.metrics.Mean(name="my_loss")

    @property
    def metrics(self):
        return [self.tracker]

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = mean_square(y, self(x, training=True))
        self.optimizer.minimize(loss, self.trainable_variables, tape=tape)
        self.tracker.update_state(loss)
        return {"mine": self.tracker.result(), "step": self.optimizer.iterations}


class Apply(TwoLayers):
    """`apply_gradients` by keyword, with arguments of its own, halved by hand; `compiled_loss`."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compiled_loss(y, self(x, training=True), regularization_losses=self.losses)
        gradients = tape.gradient(loss, self.trainable_variables)
        pairs = [(gradient * 0.5, v) for gradient, v in zip(gradients, self.trainable_variables)]
        self.optimizer.apply_gradients(grads_and_vars=pairs, name="halved")
        return {"loss": loss}


class TwoTapes(TwoLayers):
    """The gradients of two losses, added by hand."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as first, tf.GradientTape() as second:
            y_pred = self(x, training=True)
            near = mean_square(y, y_pred)
            small = 0.1 * tf.reduce_mean(tf.abs(y_pred))
        variables = self.trainable_variables
        sums = map(tf.add, first.gradient(near, variables), second.gradient(small, variables))
        self.optimizer.apply_gradients(zip(sums, variables))
        return {"near": near, "small": small}


class ScaledByHand(TwoLayers):
    """A `LossScaleOptimizer` driven by hand."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
            scaled = self.optimizer.get_scaled_loss(loss)
        gradients = tape.gradient(scaled, self.trainable_variables)
        gradients = self.optimizer.get_unscaled_gradients(gradients)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables))
        return {"loss": loss}


class OwnLoss(TwoLayers):
    """A `compute_loss` of its own under tf_keras's `train_step`, which logs what it gives."""

    def __init__(self):
        super().__init__()
        self.tracker = tf_keras.metrics.Mean(name="own")

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, **kwargs):
        loss = tf.reduce_mean(tf.abs(y - y_pred)) + tf.add_n(self.losses)
        self.tracker.update_state(loss)
        return loss


class OwnLossOfInputs(TwoLayers):
    """A `compute_loss` of another signature, and a `train_step` for it."""

    def compute_loss(self, inputs, training=False):
        x, y = inputs["x"], inputs["y"]
        return mean_square(y, self(x, training=training))

    def train_step(self, inputs):
        with tf.GradientTape() as tape:
            loss = self.compute_loss(inputs, training=True)
            total = loss + sum(self.losses)
        gradients = tape.gradient(total, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables))
        return {"loss": loss, "total": total}


class OwnMetrics(TwoLayers):
    """`compute_metrics` of its own."""

    def compute_metrics(self, x, y, y_pred, sample_weight):
        return {**super().compute_metrics(x, y, y_pred, sample_weight), "seen": tf.shape(x)[0]}


class OwnFunction(TwoLayers):
    """A `make_train_function` of its own, which takes no arguments and sets no attribute."""

    def make_train_function(self):
        def step(iterator):
            return self.train_step(next(iterator))

        return tf.function(step)


class OnTop(TwoLayers):
    """tf_keras's `train_step` on data that it changes before, by the count of updates."""

    def train_step(self, data):
        x, y = data
        x = tf.cond(self.optimizer.iterations > 0, lambda: x * 2.0, lambda: x)
        return {**super().train_step((x, y)), "rate": self.optimizer.learning_rate}


class Autoencoder(tf_keras.Model):
    """Features only, no targets, no compiled loss."""

    def __init__(self):
        super().__init__()
        self.code = dense(2, "tanh")
        self.decode = dense(4)

    def call(self, x):
        return self.decode(self.code(x))

    def train_step(self, x):
        with tf.GradientTape() as tape:
            loss = mean_square(x, self(x))
        self.optimizer.minimize(loss, self.trainable_variables, tape=tape)
        return {"loss": loss}


class Adversaries(tf_keras.Model):
    """Two networks, two optimizers, arguments of its own to `compile`, no compiled loss."""

    def __init__(self):
        super().__init__()
        self.generator = tf_keras.Sequential([dense(3, "tanh"), dense(4)])
        self.critic = tf_keras.Sequential([dense(3, "tanh"), dense(1)])

    def call(self, x):
        return self.critic(self.generator(x))

    def compile(self, critic_optimizer, generator_optimizer, penalty=0.1):
        super().compile()
        self.critic_optimizer = critic_optimizer
        self.generator_optimizer = generator_optimizer
        self.penalty = penalty

    def losses_of(self, x):
        fake = self.critic(self.generator(x[:, ::-1]))
        gap = tf.reduce_mean(self.critic(x)) - tf.reduce_mean(fake)
        return gap + self.penalty * tf.reduce_mean(fake**2), tf.reduce_mean(tf.nn.softplus(fake))

    def train_step(self, x):
        with tf.GradientTape(persistent=True) as tape:
            of_critic, of_generator = self.losses_of(x)
        critic, generator = self.critic.trainable_variables, self.generator.trainable_variables
        by_critic = tape.gradient(of_critic, critic)
        by_generator = tape.gradient(of_generator, generator)
        self.critic_optimizer.apply_gradients(zip(by_critic, critic))
        self.generator_optimizer.apply_gradients(zip(by_generator, generator))
        return {"critic": of_critic, "generator": of_generator}


class Phases(Adversaries):
    """One of its two optimizers at a step: the critic at two of three."""

    def __init__(self):
        super().__init__()
        self.phase = tf.Variable(0, trainable=False, dtype=tf.int64)

    def train_step(self, x):
        is_generators = tf.equal(self.phase.assign_add(1) % 3, 0)
        return {
            "loss": tf.cond(
                is_generators, lambda: self.train_generator(x), lambda: self.train_critic(x)
            )
        }

    def train_critic(self, x):
        with tf.GradientTape() as tape:
            loss = self.losses_of(x)[0]
        variables = self.critic.trainable_variables
        self.critic_optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables))
        return loss

    def train_generator(self, x):
        with tf.GradientTape() as tape:
            loss = self.losses_of(x)[1]
        variables = self.generator.trainable_variables
        self.generator_optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables))
        return loss


class Held(TwoLayers):
    """Optimizers in a dict of lists, both of which train the same variables."""

    def compile(self, optimizers_by_loss):
        super().compile()
        self.optimizers_by_loss = optimizers_by_loss

    def train_step(self, data):
        x, y = data
        with tf.GradientTape(persistent=True) as tape:
            y_pred = self(x, training=True)
            near, small = mean_square(y, y_pred), tf.reduce_mean(tf.abs(y_pred))
        variables = self.trainable_variables
        first, second = tape.gradient(near, variables), tape.gradient(small, variables)
        self.optimizers_by_loss["near"][0].apply_gradients(zip(first, variables))
        self.optimizers_by_loss["small"][0].apply_gradients(zip(second, variables))
        return {"near": near, "small": small}


class Router(tf_keras.optimizers.Optimizer):
    """Kernels to one optimizer, biases to another."""

    def __init__(self, kernels, biases):
        super().__init__(name="router")
        self.kernels, self.biases = kernels, biases
        self._learning_rate = self._build_learning_rate(1.0)

    def build(self, variables):
        super().build(variables)

    def apply_gradients(self, grads_and_vars, **kwargs):
        pairs = list(grads_and_vars)
        self.kernels.apply_gradients([pair for pair in pairs if len(pair[1].shape) > 1])
        self.biases.apply_gradients([pair for pair in pairs if len(pair[1].shape) == 1])
        return self.iterations.assign_add(1)

    def get_config(self):
        return {}


class PlainRouter:
    """The same, by a class that is no optimizer of tf_keras."""

    def __init__(self, **by_rank):
        self.by_rank = by_rank

    def apply_gradients(self, grads_and_vars):
        pairs = list(grads_and_vars)
        self.by_rank["kernels"].apply_gradients([pair for pair in pairs if len(pair[1].shape) > 1])
        self.by_rank["biases"].apply_gradients([pair for pair in pairs if len(pair[1].shape) == 1])


class Routed(TwoLayers):
    """A router that is no optimizer of tf_keras; the optimizers in it are its attributes too."""

    def compile(self, kernels, biases):
        super().compile()
        self.kernels_optimizer, self.biases_optimizer = kernels, biases
        self.router = PlainRouter(kernels=kernels, biases=biases)

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = mean_square(y, self(x, training=True))
        variables = self.trainable_variables
        self.router.apply_gradients(zip(tape.gradient(loss, variables), variables))
        return {"loss": loss}


class Averaged(TwoLayers):
    """A moving average of its weights, moved at each step."""

    def __init__(self):
        super().__init__()
        self.average = tf.train.ExponentialMovingAverage(0.5)
        self.before = tf.train.ExponentialMovingAverage(0.5)

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = mean_square(y, self(x, training=True))
        self.before.apply(self.trainable_variables)
        self.optimizer.minimize(loss, self.trainable_variables, tape=tape)
        self.average.apply(self.trainable_variables)
        return {"loss": loss}


class Centralized(optimizers.SGD):
    """Gradients are centred where they are computed; the update is twice as long."""

    def compute_gradients(self, loss, var_list, tape=None):
        pairs = super().compute_gradients(loss, var_list, tape)
        return [(g if g is None else g - tf.reduce_mean(g), v) for g, v in pairs]

    def apply_gradients(self, grads_and_vars, *args, **kwargs):
        doubled = [(g if g is None else 2.0 * g, v) for g, v in grads_and_vars]
        return super().apply_gradients(doubled, *args, **kwargs)


class OwnMinimize(legacy.SGD):
    """A `minimize` of its own, which hands on through its own `apply_gradients`."""

    def minimize(self, loss, var_list, grad_loss=None, name=None, tape=None):
        gradients = tape.gradient(loss, var_list)
        return self.apply_gradients(zip([0.5 * gradient for gradient in gradients], var_list))


class Lookahead(optimizers.Optimizer):
    """Every second update the weights go back half the way (Zhang et al. 2019)."""

    def __init__(self, inner):
        super().__init__(name="lookahead")
        self.inner = inner
        self._learning_rate = self._build_learning_rate(1.0)

    def build(self, variables):
        super().build(variables)
        self.inner.build(variables)
        self.slow = [tf.Variable(v, trainable=False) for v in variables]

    def apply_gradients(self, grads_and_vars, **kwargs):
        pairs = list(grads_and_vars)
        if not hasattr(self, "slow"):
            with tf.init_scope():
                self.build([variable for _, variable in pairs])
        self.inner.apply_gradients(pairs)
        steps = self.iterations.assign_add(1)
        for (_, variable), slow in zip(pairs, self.slow):
            middle = slow + 0.5 * (variable - slow)
            variable.assign(tf.where(steps % 2 == 0, middle, variable))
            slow.assign(tf.where(steps % 2 == 0, middle, slow))
        return steps

    def get_config(self):
        return {}


class ByRow(optimizers.SGD):
    """The gradient of each row is clipped, then their mean is taken; it wants a loss by row."""

    def compute_gradients(self, loss, var_list, tape=None):
        with tape:
            rows = tf.reshape(loss, [-1])
        clipped = []
        for jacobian in tape.jacobian(rows, var_list):
            axes = list(range(1, len(jacobian.shape)))
            norms = tf.sqrt(tf.reduce_sum(jacobian**2, axes, keepdims=True))
            clipped.append(
                tf.reduce_mean(
                    jacobian * tf.math.divide_no_nan(tf.clip_by_value(norms, 0, 0.1), norms), 0
                )
            )
        return list(zip(clipped, var_list))


def _compiled(model_class, optimizer=momentum, loss="mse", **kwargs):
    def build():
        model = model_class()
        model.compile(optimizer(), loss=loss, **kwargs)
        return model

    return build, regression


def adversaries(model_class=Adversaries):
    model = model_class()
    model.compile(momentum(), optimizers.Adam(0.02), penalty=0.2)
    return model


def _held():
    model = Held()
    model.compile({"near": [momentum()], "small": [optimizers.Adagrad(0.1)]})
    return model


def _routed():
    model = Routed()
    model.compile(momentum(), optimizers.RMSprop(0.01))
    return model


def _autoencoder():
    model = Autoencoder()
    model.compile(momentum())
    return model


def _own_loss_of_inputs():
    model = OwnLossOfInputs()
    model.compile(momentum())
    return model


def _named(rng, rows):
    x, y = regression(rng, rows)
    return {"x": x, "y": y}


def _step_of_the_object():
    model = TwoLayers()
    own_step = model.train_step

    def train_step(data):
        x, y = data
        return own_step((2.0 * x, y))

    model.train_step = tf.function(train_step)
    model.compile(momentum(), "mse")
    return model


class Flat(TwoLayers):
    """Without a regulariser, which a loss by row has no place for."""

    def __init__(self):
        super().__init__()
        self.hidden.kernel_regularizer = None


LAW = {
    "plain call": _compiled(TwoLayers),
    "minimize": _compiled(Minimize, loss=None),
    "apply_gradients": _compiled(Apply),
    "legacy optimizer": _compiled(Apply, lambda: legacy.Adam(0.02)),
    "two tapes": _compiled(TwoTapes, loss=None),
    "loss scale by hand": _compiled(
        ScaledByHand, lambda: tf_keras.mixed_precision.LossScaleOptimizer(momentum())
    ),
    "compute_loss": _compiled(OwnLoss, loss=None),
    "compute_loss of inputs": (_own_loss_of_inputs, _named),
    "compute_metrics": _compiled(OwnMetrics, metrics=["mae"]),
    "make_train_function": _compiled(OwnFunction),
    "on top": _compiled(OnTop),
    "step of the object": (_step_of_the_object, regression),
    "features only": (_autoencoder, features),
    "two optimizers": (adversaries, features),
    "optimizers in containers": (_held, regression),
    "router": _compiled(TwoLayers, lambda: Router(momentum(), optimizers.Adam(0.02))),
    "router of its own": (_routed, regression),
    "compute_gradients": _compiled(TwoLayers, lambda: Centralized(0.1)),
    "own minimize": _compiled(TwoLayers, lambda: OwnMinimize(0.1)),
    "lookahead": _compiled(TwoLayers, lambda: Lookahead(momentum())),
    "moving average": _compiled(Averaged),
    "loss by row": _compiled(
        Flat, lambda: ByRow(0.1), tf_keras.losses.MeanSquaredError(reduction="none")
    ),
}
