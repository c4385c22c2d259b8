"""Registration: what lets every format of tf_keras find the classes of a converted model."""

from __future__ import annotations

import tf_keras

from ga_transform.models import AccumulatingFunctional, AccumulatingModel, AccumulatingSequential

__all__: list[str] = []

for _model_class in (AccumulatingModel, AccumulatingFunctional, AccumulatingSequential):
    tf_keras.utils.register_keras_serializable("ga_transform")(_model_class)
    # HDF5 files hold the bare name of a class, without its package.
    tf_keras.utils.get_custom_objects()[_model_class.__name__] = _model_class
