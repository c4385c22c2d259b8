"""The one door to tf_keras: its internals, and what differs between its versions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Optional

import tensorflow as tf
from tf_keras import Model, Sequential, optimizers
from tf_keras.layers import Layer
from tf_keras.losses import Loss, Reduction
from tf_keras.metrics import Metric
from tf_keras.src.backend import RandomGenerator
from tf_keras.src.engine import data_adapter, functional
from tf_keras.src.engine.base_layer import BaseRandomLayer
from tf_keras.src.engine.base_layer_utils import REVIVED_LOSS_PLACEHOLDER
from tf_keras.src.engine.compile_utils import LossesContainer
from tf_keras.src.engine.functional import Functional
from tf_keras.src.layers.core.tf_op_layer import ClassMethod, TFOpLambda
from tf_keras.src.layers.normalization.batch_normalization import BatchNormalizationBase
from tf_keras.src.mixed_precision.autocast_variable import (
    AutoCastVariable,
    create_autocast_variable,
)
from tf_keras.src.mixed_precision.loss_scale_optimizer import BaseLossScaleOptimizer
from tf_keras.src.optimizers.legacy.optimizer_v2 import _var_key as legacy_variable_key
from tf_keras.src.saving import object_registration
from tf_keras.src.saving.legacy.saved_model.load import RevivedLayer, RevivedNetwork
from tf_keras.src.saving.serialization_lib import SafeModeScope
from tf_keras.src.utils import losses_utils

__all__ = [
    "REVIVED",
    "AutoTrackable",
    "BaseLossScaleOptimizer",
    "BaseRandomLayer",
    "BatchNormalizationBase",
    "Functional",
    "Layer",
    "LossesContainer",
    "Model",
    "OpLayer",
    "RandomGenerator",
    "SafeModeScope",
    "Sequential",
    "activation_losses",
    "averages_of",
    "call_symbolically",
    "computes_in_float16",
    "count_parts",
    "ending_layers",
    "epoch_of_backup",
    "flatten_layers",
    "forget_inference",
    "forget_traces",
    "has_functional_init",
    "has_own_code",
    "has_own_gradients",
    "has_sum_losses",
    "held_by",
    "held_sum_losses",
    "is_built_under",
    "is_default",
    "is_keras_own",
    "is_of_keras",
    "is_optimizer",
    "is_preprocessing",
    "masks_of_outputs",
    "metrics_of",
    "optimizers_of",
    "optimizers_within",
    "output_layers",
    "place_activation_losses",
    "positions_of",
    "random_generators_of",
    "reference_of",
    "register_under",
    "replace_in_compile_config",
    "retrack",
    "shared_by_replicas",
    "tracing_once",
    "trained_positions",
    "unpack_x_y_sample_weight",
    "untrack",
    "variable_key",
    "weight_losses",
    "weights_in_containers",
    "weights_of",
    "with_autocast",
    "without_autocast",
]

#: Tracked by checkpoints; its variables are not weights of the model that holds it.
AutoTrackable = tf.__internal__.tracking.AutoTrackable

#: Layers that functional models make of ops on their tensors.
OpLayer = (TFOpLambda, ClassMethod)
#: What a SavedModel brings back where it does not know the class.
REVIVED = (RevivedLayer, RevivedNetwork)

_OPTIMIZERS = (optimizers.Optimizer, optimizers.legacy.Optimizer, BaseLossScaleOptimizer)
unpack_x_y_sample_weight = data_adapter.unpack_x_y_sample_weight
shared_by_replicas = losses_utils.scale_loss_for_distribution


def register_under(model_class: type, registered_name: str) -> None:
    """Have a class written down under a name that another one is registered by."""
    object_registration._GLOBAL_CUSTOM_NAMES[model_class] = registered_name


def optimizers_of(model: Any) -> list[Any]:
    """The optimizers that a model and its layers hold, by themselves or in containers."""
    return held_by(model, is_optimizer)


def optimizers_within(model: Any) -> list[Any]:
    """These, and those that optimizers and other objects of a model hold in their turn."""
    found = {id(optimizer): optimizer for optimizer in optimizers_of(model)}
    holders = [*found.values(), *held_by(model, _is_holder)]
    for _ in range(2):
        items = [
            item for holder in holders for value in _attributes(holder) for item in _items(value)
        ]
        held = {id(item): item for item in items if is_optimizer(item) and id(item) not in found}
        found.update(held)
        holders = [*held.values(), *filter(_is_holder, items)]
    return list(found.values())


def _is_holder(item: Any) -> bool:
    """Whether an object is of a class of somebody's own, which may hold optimizers."""
    package = type(item).__module__.split(".")[0]
    return package not in ("builtins", "numpy", "tensorflow", "tf_keras", "keras", "abc") and not (
        isinstance(item, (Layer, type)) or callable(item)
    )


def _attributes(holder: Any) -> list[Any]:
    return list(getattr(holder, "__dict__", {}).values())


def averages_of(model: Any) -> list[Any]:
    """The moving averages of weights that a model and its layers hold."""
    return held_by(model, lambda item: isinstance(item, tf.train.ExponentialMovingAverage))


def metrics_of(model: Any) -> list[Any]:
    """The metrics of a model, of its compile, and of its layers, each once."""
    held = [layer for layer in model._flatten_layers() if isinstance(layer, Metric)]
    return list({id(metric): metric for metric in (*model.metrics, *held)}.values())


def tracing_once(optimizers_called: Iterable[Any] = ()) -> contextlib.AbstractContextManager[Any]:
    """Have a function that makes variables in its first trace not be traced a second time.

    `tf.function` does so in order to have a trace that makes none. It need not where all are made
    outside of functions (`tf.init_scope`), as optimizers, metrics and windows make theirs.

    Args:
        optimizers_called: Those that the function calls. tf_keras's Nadam counts in Python while
            it is traced: it goes on as in a plain model if it is traced as often.
    """
    called = [getattr(each, "inner_optimizer", each) for each in optimizers_called]
    if any(isinstance(each, optimizers.Nadam) for each in called):
        return contextlib.nullcontext()

    def make(next_creator: Callable[..., Any], **kwargs: Any) -> Any:
        if tf.executing_eagerly():
            kwargs["experimental_enable_variable_lifting"] = False
        return next_creator(**kwargs)

    return tf.variable_creator_scope(make)  # type: ignore[no-any-return]


def count_parts(model: Any) -> int:
    """How many there are of what a first step may add to a model: layers, and what they hold.

    The metrics that `compile` was given by name are left out.
    """
    layers = list(model._flatten_layers())
    metrics = [metric for layer in layers for metric in getattr(layer, "_metrics", ())]
    return len(layers) + len(metrics) + len(optimizers_within(model)) + len(averages_of(model))


def held_by(model: Any, is_wanted: Callable[[Any], bool]) -> list[Any]:
    """The objects of a kind among the attributes of a model and its layers, each once."""
    found = {}
    for layer in model._flatten_layers():
        for value in vars(layer).values():
            for item in _items(value):
                if is_wanted(item):
                    found[id(item)] = item
    return list(found.values())


def _items(value: Any) -> Iterator[Any]:
    """A value, or what a container of containers holds."""
    if isinstance(value, (str, bytes)):
        return
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (Sequence, set)):
        for item in value:
            yield from _items(item)
    else:
        yield value


def is_optimizer(item: Any) -> bool:
    """Whether an object is an optimizer of tf_keras, or can be called like one."""
    if is_of_keras(item):
        return True
    return callable(getattr(type(item), "apply_gradients", None)) and not isinstance(item, Layer)


def is_of_keras(optimizer: Any) -> bool:
    """Whether an optimizer is of a class of tf_keras, or derived from one."""
    return isinstance(optimizer, _OPTIMIZERS)


def has_own_gradients(optimizer: Any) -> bool:
    """Whether an optimizer computes its gradients by a method that is not tf_keras's."""
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    for name in ("minimize", "compute_gradients", "_compute_gradients", "get_gradients"):
        method = getattr(type(optimizer), name, None)
        if method is not None and method.__module__.split(".")[0] != "tf_keras":
            return True
    return False


def variable_key(optimizer: Any, variable: tf.Variable) -> str:
    """The key under which an optimizer, new or legacy, keeps a variable's slots."""
    own = getattr(optimizer, "_var_key", None)
    return str(legacy_variable_key(variable) if own is None else own(variable))


def computes_in_float16(model: Any) -> bool:
    """Whether gradients of a model may pass through float16, which holds none above 65,504."""
    return any(layer.compute_dtype == "float16" for layer in model._flatten_layers())


def has_functional_init(model_class: type) -> bool:
    """Whether a class is made from inputs and outputs, as a functional model is."""
    return issubclass(model_class, Sequential) or functional.has_functional_like_constructor(
        model_class
    )


def is_built_under(model: Any, strategy: tf.distribute.Strategy) -> bool:
    """Whether a model was built in the scope of a strategy."""
    return model._distribution_strategy is strategy


def is_default(strategy: tf.distribute.Strategy) -> bool:
    """Whether a strategy is that of models which are built under none."""
    return type(strategy).__name__ == "_DefaultDistributionStrategy"


def is_keras_own(model: Any, mixin: type, method: str) -> bool:
    """Whether a method behind the mixin is that of tf_keras's `Model` itself."""
    behind = getattr(super(mixin, type(model)), method)
    return method not in vars(model) and behind is getattr(Model, method)


def held_sum_losses(model: Any) -> list[Any]:
    """The loss objects that a model and its layers hold, and that sum over their elements."""
    return held_by(
        model,
        lambda item: isinstance(item, Loss) and item.reduction in (Reduction.SUM, Reduction.NONE),
    )


def has_sum_losses(model: Any) -> bool:
    """Whether a compiled loss sums over its elements, or leaves them unreduced."""
    losses = tf.nest.flatten(getattr(model.compiled_loss, "_losses", None))
    return any(
        getattr(loss, "reduction", None) in (Reduction.SUM, Reduction.NONE) for loss in losses
    )


def epoch_of_backup(model: Any) -> Optional[int]:
    """The epoch in which the backup was made that `BackupAndRestore` has restored, if any."""
    state = getattr(model, "_training_state", None)
    epoch = -1 if state is None else int(state._ckpt_saved_epoch.numpy())
    return None if epoch < 0 else epoch


def weights_of(model: Any) -> list[Any]:
    """A model's weights, as far as they are made, in an order that no `trainable` changes."""
    try:
        weights = list(model.weights)
    except ValueError:
        return []
    by_layer = [
        weight
        for layer in model._flatten_layers()
        for weight in (*layer._trainable_weights, *layer._non_trainable_weights)
    ]
    found = {id(weight): weight for weight in (*by_layer, *weights)}
    return [found[identity] for identity in found if isinstance(found[identity], tf.Variable)]


def reference_of(variable: Any) -> Any:
    """What tells a variable from others, be it read as it is or in another precision."""
    return without_autocast(variable).ref()


def positions_of(model: Any) -> dict[Any, int]:
    """By reference, where variables stand among a model's weights."""
    return {reference_of(weight): position for position, weight in enumerate(weights_of(model))}


def trained_positions(model: Any) -> list[int]:
    """Where the weights that a model trains stand among all."""
    positions = positions_of(model)
    trained = {reference_of(weight) for weight in model.trainable_weights} if positions else set()
    return [position for reference, position in positions.items() if reference in trained]


def forget_inference(model: Any) -> None:
    """Have `evaluate` and `predict` traced anew, of nested models too."""
    for layer in model._flatten_layers():
        if isinstance(layer, Model):
            layer.test_function = layer.predict_function = None


def forget_traces(model: Any) -> None:
    """Have methods of a model that are functions of TensorFlow traced anew."""
    for each in type(model).__mro__:
        for method in vars(each).values():
            traced_by_object = getattr(method, "_descriptor_cache", None)
            if traced_by_object is not None:
                traced_by_object.pop(model, None)


def flatten_layers(model: Any) -> list[Any]:
    """The model, its layers, and the layers inside them."""
    return list(model._flatten_layers())


def activation_losses(model: Any) -> list[tf.Tensor]:
    """What `add_loss` and activity regularisers gave for the rows of the latest call."""
    found: list[tf.Tensor] = []
    for layer in model._flatten_layers():
        found.extend(layer._eager_losses or layer._losses)
    return [loss for loss in found if loss is not REVIVED_LOSS_PLACEHOLDER]


def place_activation_losses(model: Any, losses: Sequence[tf.Tensor]) -> None:
    """Put others in the place of the `activation_losses` that a call has left, in their order."""
    ahead = iter(losses)
    for layer in model._flatten_layers():
        layer._thread_local._eager_losses = [
            each if each is REVIVED_LOSS_PLACEHOLDER else next(ahead)
            for each in layer._eager_losses
        ]


def random_generators_of(model: Any) -> list[Any]:
    """What the layers of a model draw random numbers by."""
    return held_by(model, lambda item: isinstance(item, RandomGenerator))


def weight_losses(model: Any) -> list[tf.Tensor]:
    """What regularisers and callables passed to `add_loss` give: the same for all rows."""
    losses = [
        function() for layer in model._flatten_layers() for function in layer._callable_losses
    ]
    return [loss for loss in losses if loss is not None]


def output_layers(model: Any) -> Iterator[Any]:
    """For each output, the last layers with weights on its way, seen through wrappers.

    For a subclassed model, whose order of calls is not known, its last layer with weights.
    """
    if isinstance(model, Functional) and getattr(model, "outputs", None):
        for output in model.outputs:
            yield from _last_layers(output)
        return
    last = next((layer for layer in reversed(model.layers) if layer.weights), None)
    if last is not None:
        yield from _innermost(last)


def _last_layers(output: Any) -> Iterator[Any]:
    """The layers with weights that reach an output through layers without any.

    Of two that reach it, one that feeds the other (around a residual) is not the last.
    """
    last: dict[Any, Any] = {}
    ways = [output]
    while ways:
        tensor = ways.pop()
        layer, inputs = _origin(tensor)
        if layer.weights:
            last.setdefault(layer, (tensor, inputs))
        else:
            ways.extend(inputs)
    for layer, (tensor, _) in last.items():
        others = [inputs for other, (_, inputs) in last.items() if other is not layer]
        if any(layer in _upstream(inputs) for inputs in others):
            continue
        if isinstance(layer, Functional):
            yield from _last_layers(layer.outputs[tensor._keras_history.tensor_index])
        else:
            yield from _innermost(layer)


def _origin(tensor: Any) -> tuple[Any, list[Any]]:
    """The layer that made a Keras tensor, and what it made it of."""
    layer, node_index, _ = tensor._keras_history
    return layer, tf.nest.flatten(layer._inbound_nodes[node_index].keras_inputs)


def _upstream(tensors: list[Any]) -> set[Any]:
    found: set[Any] = set()
    ways = list(tensors)
    while ways:
        layer, inputs = _origin(ways.pop())
        if layer not in found:
            found.add(layer)
            ways.extend(inputs)
    return found


def _innermost(layer: Any) -> Iterator[Any]:
    if isinstance(layer, Model):
        yield from output_layers(layer)
    elif hasattr(layer, "layer"):  # TimeDistributed and other wrappers
        yield from _innermost(layer.layer)
    else:
        yield layer


def ending_layers(model: Any) -> Iterator[Any]:
    """For each output, the last layers with weights and all from there to the output.

    For a subclassed model, whose order of calls is not known, the last in order of its attributes.
    """
    if isinstance(model, Functional) and getattr(model, "outputs", None):
        for output in model.outputs:
            yield from _layers_to(output)
        return
    layers = [layer for layer in model.layers if not isinstance(layer, Metric)]
    for layer in reversed(layers):
        yield from layer._flatten_layers()
        # A layer that has no weights may only not be built yet.
        if weights_of(layer) or not (layer.built or _is_weightless(layer)):
            return


def _layers_to(output: Any) -> Iterator[Any]:
    last = list(_last_layers(output))
    ways, seen = [output], set()
    while ways:
        tensor = ways.pop()
        layer, inputs = _origin(tensor)
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if not layer.weights:
            yield layer
            ways.extend(inputs)
        elif any(each in last for each in layer._flatten_layers()):
            if isinstance(layer, Functional):
                yield from _layers_to(layer.outputs[tensor._keras_history.tensor_index])
            else:
                yield from layer._flatten_layers()


def _is_weightless(layer: Any) -> bool:
    """Whether layers of a class of tf_keras have no weights, built or not."""
    kinds = ("activation", "merging", "pooling", "regularization", "reshaping")
    modules = {f"tf_keras.src.layers.{kind}" for kind in kinds}
    own = type(layer).__module__
    return own.rpartition(".")[0] in modules or own == "tf_keras.src.layers.core.activation"


def is_preprocessing(layer: Any) -> bool:
    """Whether a layer is one of tf_keras's that prepare raw data, or derived from one."""
    start = "tf_keras.src.layers.preprocessing."
    return any(each.__module__.startswith(start) for each in type(layer).__mro__)


def with_autocast(weight: Any) -> Any:
    """A weight that is read in the precision of the layer that reads it."""
    if isinstance(weight, AutoCastVariable) or not isinstance(weight, tf.Variable):
        return weight
    return create_autocast_variable(weight) if weight.dtype.is_floating else weight


def without_autocast(weight: Any) -> Any:
    """The weight itself."""
    return weight._variable if isinstance(weight, AutoCastVariable) else weight


def weights_in_containers(layer: Any) -> bool:
    """Whether a layer holds weights otherwise than as attributes."""
    held = set(map(id, vars(layer).values()))
    own = (*layer._trainable_weights, *layer._non_trainable_weights)
    return not held.issuperset(map(id, own))


def retrack(layer: Any, fitting: Mapping[int, Any]) -> None:
    """Have a layer's own books name other objects for the same variables.

    Args:
        layer: Its attributes are replaced already.
        fitting: By the identity of the object that it held, the one that it holds.
    """
    counts = layer._obj_reference_counts
    for held in [each for each in counts if id(each) in fitting]:
        counts[fitting[id(held)]] = counts.pop(held)
    for name, held in list(getattr(layer, "_unconditional_dependency_names", {}).items()):
        if id(held) in fitting:
            layer._track_trackable(fitting[id(held)], name=name, overwrite=True)


def untrack(holder: Any, name: str) -> None:
    """Have checkpoints of an object leave out what it tracks under a name."""
    if holder._unconditional_dependency_names.pop(name, None) is not None:
        references = holder._unconditional_checkpoint_dependencies
        references[:] = [each for each in references if each.name != name]


def replace_in_compile_config(model: Any, optimizer: Any) -> None:
    """Have the files of a compiled model name another optimizer."""
    config = getattr(model, "_compile_config", None)
    if config is not None:
        config.config["optimizer"] = optimizer


def has_own_code(model: Any) -> bool:
    """Whether a model that is built is, or holds, a layer of a class that is not of tf_keras."""
    if not model.built or getattr(model, "save_spec", lambda: None)() is None:
        return False
    kinds = [each for layer in model._flatten_layers() for each in type(layer).__mro__]
    packages = {each.__module__.split(".")[0] for each in kinds}
    return not packages <= {"abc", "builtins", "ga_transform", "tensorflow", "tf_keras"}


def masks_of_outputs(model: Any) -> list[Any]:
    """By output of a functional model, its mask as training sees it; one that is shared is one."""
    masks: list[Any] = []

    def call(inputs: Any) -> None:
        outputs = tf.nest.flatten(model(inputs, training=True))
        masks.extend(getattr(output, "_keras_mask", None) for output in outputs)

    specs = tf.nest.map_structure(lambda each: each.type_spec, model.input)
    tf.function(call).get_concrete_function(specs)
    return masks


def call_symbolically(model: Any) -> None:
    """Call a model that is built on tensors without values, of the shapes that it has seen."""
    args, kwargs = model.save_spec(dynamic_batch=False)

    def call(args: Any, kwargs: Any) -> Any:
        return model(*args, **{"training": True, **kwargs})

    tf.function(call).get_concrete_function(args, kwargs)
