"""The loss of a whole batch, in the memory of a slice of it: gradient caching.

Where a loss couples the rows of a batch, it is no mean of its slices' losses. Its gradient can be
had in slices nevertheless, as it comes to the weights through the outputs of the model only:

1. All slices are passed through the model, and nothing but their outputs is kept (`forward.py`).
2. The loss is taken of the outputs of the whole batch, and its gradient with respect to these
   (`loss.py`).
3. Each slice is passed through the model again, and the gradient of its outputs pulled back to
   the weights (`pull.py`). The slices are micro-steps of one batch (`split.py`), whose gradients
   add up.

The second pass finds all that the first one found (`../repeating.py`). After Gao et al. 2021,
"Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup".
"""

from __future__ import annotations

from typing import Any

from ga_transform import _graphs, _keras
from ga_transform.repeating import State
from ga_transform.slices import Slices
from ga_transform.specs import Split
from ga_transform.whole_batch.forward import pass_forward
from ga_transform.whole_batch.loss import differentiate
from ga_transform.whole_batch.pull import pull_back
from ga_transform.whole_batch.seen import Seen
from ga_transform.windows import Windows

__all__ = ["check_gradients_are_usual", "train_on_whole_batch"]


def check_gradients_are_usual(optimizer: Any) -> None:
    """Refuse an optimizer that does more with a loss than to take its gradient.

    Raises:
        ValueError: It has a method of its own for that.
    """
    if _keras.has_own_gradients(optimizer):
        raise ValueError(
            "Split.whole_batch_loss must be given an optimizer that takes the gradient of one "
            f"loss; got {type(optimizer).__name__}, which computes its own. Leave "
            "whole_batch_loss out."
        )


def train_on_whole_batch(
    model: Any, windows: Windows, data: Any, split: Split, *, is_usual_loss: bool
) -> Any:
    """Run tf_keras's training step with the loss of a whole batch, slice by slice.

    Args:
        model: The converted model, whose `train_step` is tf_keras's own.
        windows: The windows of its optimizers.
        data: A batch, as Keras gives it to `train_step`.
        split: How many rows a slice has, and whose rows the loss sees.
        is_usual_loss: Whether `compute_loss` is tf_keras's own.

    Returns:
        The logs of the batch.
    """
    x, y, sample_weight = _keras.unpack_x_y_sample_weight(data)
    slices = Slices(x, split.micro_batch_size, has_fixed_size=_graphs.is_compiled())
    seen = Seen(slices.rows, of_all=split.whole_batch_loss == "gathered")
    with windows.draws.of_batch(model):
        forward = pass_forward(model, windows, slices, seen)
        # A loss of the model's own may call it, too.
        state_of_loss = State([]) if is_usual_loss else forward.state
        before_loss = state_of_loss.now()
        gradient = differentiate(
            model, windows, seen, forward, x, y, sample_weight, is_usual_loss=is_usual_loss
        )
        after_loss = state_of_loss.now()
        forward.state.restore()
        pull_back(model, windows, seen, gradient, x, split.micro_batch_size)
        # Pools move their statistics with the window, to what the slices have shown.
        after_loss.restore_changes_since(before_loss, but=windows.pools.statistics)
    # The latest pass has left those of a slice.
    _keras.place_activation_losses(model, forward.activations)
    return model.compute_metrics(x, y, forward.outputs, sample_weight)
