"""A forward pass that is run twice: the second run finds all that the first one found.

What a pass changes (moving statistics, the states of layers and of random generators) is set back
between the two, so that it has changed once in the end. The random layers of tf_keras draw from
operations whose state is out of reach; while a pass is repeated they draw by numbers that a
variable counts, which is set back like others.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Optional

import tensorflow as tf

from ga_transform import _graphs, _keras
from ga_transform.replicas import here, index_of_replica, local_variable

__all__ = [
    "Draws",
    "State",
    "changed_eagerly",
    "release_generators",
    "unrepeatable_layers",
    "unrepeatable_operations",
]

#: The operations whose random state no variable holds.
_STATEFUL_DRAWS = frozenset(
    (
        "FixedUnigramCandidateSampler",
        "LearnedUnigramCandidateSampler",
        "LogUniformCandidateSampler",
        "Multinomial",
        "ParameterizedTruncatedNormal",
        "RandomGamma",
        "RandomPoisson",
        "RandomPoissonV2",
        "RandomShuffle",
        "RandomStandardNormal",
        "RandomUniform",
        "RandomUniformInt",
        "SampleDistortedBoundingBox",
        "SampleDistortedBoundingBoxV2",
        "ThreadUnsafeUnigramCandidateSampler",
        "TruncatedNormal",
        "UniformCandidateSampler",
    )
)

_threads = threading.local()


class State:
    """The values of variables at a moment, to be set back to.

    Args:
        handles: Of the variables.
    """

    def __init__(self, handles: Sequence[tf.Tensor]) -> None:
        self._handles = handles
        self._values = list(map(_value_of, handles))

    def now(self) -> State:
        """The same variables, at this moment."""
        return State(self._handles)

    def restore(self) -> None:
        """Set the variables back."""
        for handle, value in zip(self._handles, self._values):
            tf.raw_ops.AssignVariableOp(resource=handle, value=value)

    def restore_changes_since(self, before: State, but: Collection[tf.Variable]) -> None:
        """Set back to what was changed between another moment and this one, and that alone.

        Args:
            before: The other moment.
            but: Variables that are left as they are.
        """
        left = {id(here(variable).handle) for variable in but}
        for handle, old, new in zip(self._handles, before._values, self._values):
            if id(handle) in left:
                continue
            value = tf.where(tf.equal(old, new), _value_of(handle), new)
            tf.raw_ops.AssignVariableOp(resource=handle, value=value)


def _value_of(handle: tf.Tensor) -> tf.Tensor:
    return tf.raw_ops.ReadVariableOp(resource=handle, dtype=_graphs.dtype_of(handle))


def changed_eagerly(model: Any, draws: Draws) -> list[tf.Tensor]:
    """The handles of all that a pass of a model may change, where no graph tells what it does."""
    generators = _keras.random_generators_of(model)
    for generator in generators:
        generator._maybe_init()
    held = [generator._generator for generator in generators]
    held += _keras.held_by(model, lambda item: isinstance(item, tf.random.Generator))
    states = [generator.state for generator in held if generator is not None]
    # Tables of words are weights, too, and no variables.
    variables = [*(each for each in model.variables if isinstance(each, tf.Variable)), *states]
    return [*(here(variable).handle for variable in variables), *draws.handles]


class Draws:
    """What the random layers of a model draw by, while its passes are repeated.

    The numbers of a batch begin with one that TensorFlow draws, and so follow its global seed; or
    the seeds of the layers, where all have one.
    """

    def __init__(self) -> None:
        with tf.init_scope():
            #: What a batch draws by; and its replica, and how often it has drawn.
            self._seed = local_variable([0, 0], tf.int64, of_all="first")

    @contextmanager
    def of_batch(self, model: Any) -> Iterator[None]:
        """Have the layers of a model draw by this, in this thread, beginning with new numbers."""
        generators = _keras.random_generators_of(model)
        if not generators:  # a compiler warns of each drawn number
            yield
            return
        for generator in generators:
            if type(generator) is _keras.RandomGenerator:
                generator.__class__ = _Repeatable
        seeds = [generator._seed for generator in generators]
        own_seed = None if None in seeds else sum(seeds) % 2**31  # any that goes with theirs
        first = tf.random.uniform([], maxval=tf.int64.max, dtype=tf.int64, seed=own_seed)
        # With seeds of their own, layers would draw alike on all replicas: they count from far apart.
        here(self._seed).assign(tf.stack([first, tf.cast(index_of_replica(), tf.int64) * 2**40]))
        _threads.draws = self
        try:
            yield
        finally:
            _threads.draws = None

    @property
    def handles(self) -> list[tf.Tensor]:
        """Of what is set back before a pass is repeated."""
        return [here(self._seed).handle]

    def next_seed(self) -> tf.Tensor:
        """Another seed for a stateless operation. Shape: [2], int64."""
        seed: tf.Tensor = here(self._seed).assign_add(tf.constant([0, 1], tf.int64))
        return tf.identity(seed)


def _running_draws() -> Optional[Draws]:
    return getattr(_threads, "draws", None)


class _Repeatable(_keras.RandomGenerator):  # type: ignore[misc]
    """A generator of tf_keras that draws by `Draws` in a pass that is repeated."""

    @property
    def _rng_type(self) -> str:
        own: str = vars(self)["_rng_type"]
        is_repeated = own == self.RNG_LEGACY_STATEFUL and _running_draws() is not None
        return self.RNG_STATELESS if is_repeated else own

    @_rng_type.setter
    def _rng_type(self, value: str) -> None:
        self.__dict__["_rng_type"] = value

    def _maybe_init(self) -> None:
        if vars(self)["_rng_type"] == self.RNG_LEGACY_STATEFUL:
            self._generator, self._built = None, True  # it is made of nothing
        else:
            super()._maybe_init()

    def make_seed_for_stateless_op(self) -> Any:
        draws = _running_draws()
        if draws is None or self._rng_type != self.RNG_STATELESS:
            return super().make_seed_for_stateless_op()
        return draws.next_seed()


def release_generators(model: Any) -> None:
    """Make a model's random generators what they were."""
    for generator in _keras.random_generators_of(model):
        if isinstance(generator, _Repeatable):
            generator.__class__ = _keras.RandomGenerator


def unrepeatable_layers(model: Any, function: Any) -> list[str]:
    """The layers, or else the operations, of a traced function that draw anew when it is repeated.

    Args:
        model: Whose layers are named.
        function: A concrete function that calls it.
    """
    names = {layer.name for layer in _keras.flatten_layers(model)}
    found = dict[str, None]()
    for node in _graphs.nodes_of(function.graph):
        if node.op in _STATEFUL_DRAWS:
            scopes = [part for part in node.name.split("/") if part in names]
            found[scopes[-1] if scopes else node.name] = None
    return list(found)


def unrepeatable_operations(kinds: Collection[str]) -> list[str]:
    """Of kinds of operations that have been run, those that draw anew when they are repeated."""
    return sorted(_STATEFUL_DRAWS.intersection(kinds))
