"""Every wrong argument is refused in one line: owner and field, the rule, the value, the remedy."""

import contextlib
import functools

import attrs
import numpy as np
import pytest
import tf_keras

import ga_transform as ga
from ga_transform.errors import shown

NAN, INF = float("nan"), float("inf")


@contextlib.contextmanager
def refused(error, text):
    """The block raises exactly this error, with exactly this text."""
    with pytest.raises(Exception) as caught:  # noqa: PT011
        yield
    assert (caught.type, str(caught.value)) == (error, text)


# ---- specs ------------------------------------------------------------------------------------

STEPS = "Accumulate.steps must be an int >= 1; got"
EVERY_BATCH = "Use 1 to update on every batch."
SCHEDULE = "Accumulate.steps must be a schedule {update: steps} that starts at update 0; got"
FOR_EXAMPLE = "For example {0: 1, 1000: 8}: 1 batch an update at first, 8 from update 1000 on."
WEIGHTING = "Accumulate.weighting must be 'exact', 'equal', 'sum' or a function of the batch; got"
WEIGHS = "'exact' weighs each micro-batch by what its mean loss divided by."
REMAINDER = "Accumulate.remainder must be one of 'flush', 'carry', 'drop'; got"
NONFINITE = "Accumulate.on_nonfinite must be one of 'window', 'micro_batch'; got"
ROWS = "Split.micro_batch_size must be an int >= 1; got"
FIT = "It is the number of rows that fit in memory."
FACTOR = "Scale.factor must be a finite number; got"
USE_ONE = "Use 1.0 to change nothing."
CLIP_FACTOR = "ClipByAGC.clip_factor must be a finite number > 0; got"
PAPER = "The paper's is 0.01."
EPS = "ClipByAGC.eps must be a finite number > 0; got"
PAPER_EPS = "The paper's is 1e-3."
EXCLUDE = "ClipByAGC.exclude must be a tuple of names or globs; got"
NAMES = "Write ('head',) for one, or ('block_*',) for all that match."
AXES = "ClipByAGC.axes must be a mapping of names or globs to the axes a norm is taken over; got"
UNITS = "For example {'embedding/*': (1,)}; () makes every element a unit."
POLICY = "Precision.policy must be one of 'mixed_float16', 'mixed_bfloat16', 'float32'; got"
A_POLICY = "For example 'mixed_float16'."
MIXED = "Did you mean 'mixed_float16'?"
MODE = "BatchNorm.mode must be one of 'keep', 'momentum', 'pooled', 'freeze'; got"
A_MODE = "For example 'keep'."
NO_CLIP = "Leave the clip out to clip nothing."

#: A spec that cannot be made: (call, error, its whole text).
SPECS = [
    (lambda: ga.Accumulate(0), ValueError, f"{STEPS} 0. {EVERY_BATCH}"),
    (lambda: ga.Accumulate(-1), ValueError, f"{STEPS} -1. {EVERY_BATCH}"),
    (lambda: ga.Accumulate(np.int64(0)), ValueError, f"{STEPS} 0. {EVERY_BATCH}"),
    (lambda: ga.Accumulate(True), TypeError, f"{STEPS} True (bool). {EVERY_BATCH}"),
    (lambda: ga.Accumulate(2.5), TypeError, f"{STEPS} 2.5 (float). {EVERY_BATCH}"),
    (lambda: ga.Accumulate(4.0), TypeError, f"{STEPS} 4.0 (float). Write 4."),
    (lambda: ga.Accumulate("4"), TypeError, f"{STEPS} '4' (str). Write 4."),
    (lambda: ga.Accumulate("0"), TypeError, f"{STEPS} '0' (str). {EVERY_BATCH}"),
    (lambda: ga.Accumulate(INF), TypeError, f"{STEPS} inf (float). {EVERY_BATCH}"),
    (lambda: ga.Accumulate("many"), TypeError, f"{STEPS} 'many' (str). {EVERY_BATCH}"),
    (lambda: ga.Accumulate(None), TypeError, f"{STEPS} None (NoneType). {EVERY_BATCH}"),
    (lambda: ga.Accumulate([4]), TypeError, f"{STEPS} [4] (list). {EVERY_BATCH}"),
    (
        lambda: ga.Accumulate(np.True_),
        TypeError,
        f"{STEPS} {np.True_!r} ({type(np.True_).__name__}). {EVERY_BATCH}",
    ),
    (
        lambda: ga.Accumulate(np.array([1, 2])),
        TypeError,
        f"{STEPS} array([1, 2]) (ndarray). {EVERY_BATCH}",
    ),
    (lambda: ga.Accumulate({}), ValueError, f"{SCHEDULE} {{}}. {FOR_EXAMPLE}"),
    (lambda: ga.Accumulate({1: 4}), ValueError, f"{SCHEDULE} {{1: 4}}. {FOR_EXAMPLE}"),
    (lambda: ga.Accumulate({0: 0}), ValueError, f"{SCHEDULE} {{0: 0}}. {FOR_EXAMPLE}"),
    (
        lambda: ga.Accumulate({0: 1, -5: 2}),
        ValueError,
        f"{SCHEDULE} {{0: 1, -5: 2}}. {FOR_EXAMPLE}",
    ),
    (lambda: ga.Accumulate({0: 2.5}), TypeError, f"{SCHEDULE} {{0: 2.5}} (dict). {FOR_EXAMPLE}"),
    (lambda: ga.Accumulate({0: True}), TypeError, f"{SCHEDULE} {{0: True}} (dict). {FOR_EXAMPLE}"),
    (lambda: ga.Accumulate({"0": 4}), TypeError, f"{SCHEDULE} {{'0': 4}} (dict). {FOR_EXAMPLE}"),
    (lambda: ga.Accumulate({0.0: 4}), TypeError, f"{SCHEDULE} {{0.0: 4}} (dict). {FOR_EXAMPLE}"),
    (lambda: ga.Accumulate(2, weighting="mean"), ValueError, f"{WEIGHTING} 'mean'. {WEIGHS}"),
    (lambda: ga.Accumulate(2, weighting=3), TypeError, f"{WEIGHTING} 3 (int). {WEIGHS}"),
    (lambda: ga.Accumulate(2, weighting=None), TypeError, f"{WEIGHTING} None (NoneType). {WEIGHS}"),
    (
        lambda: ga.Accumulate(2, remainder="keep"),
        ValueError,
        f"{REMAINDER} 'keep'. The default is 'flush'.",
    ),
    (
        lambda: ga.Accumulate(2, remainder=True),
        TypeError,
        f"{REMAINDER} True (bool). The default is 'flush'.",
    ),
    (
        lambda: ga.Accumulate(2, on_nonfinite="skip"),
        ValueError,
        f"{NONFINITE} 'skip'. The default is 'window'.",
    ),
    (
        lambda: ga.Accumulate(2, on_nonfinite=None),
        TypeError,
        f"{NONFINITE} None (NoneType). The default is 'window'.",
    ),
    (lambda: ga.Split(0), ValueError, f"{ROWS} 0. {FIT}"),
    (lambda: ga.Split(2.5), TypeError, f"{ROWS} 2.5 (float). {FIT}"),
    (lambda: ga.Split(None), TypeError, f"{ROWS} None (NoneType). {FIT}"),
    (
        lambda: ga.Split(4, whole_batch_loss=1),
        TypeError,
        (
            "Split.whole_batch_loss must be True, False or 'gathered'; got 1 (int). The default is "
            "False."
        ),
    ),
    (lambda: ga.Scale(NAN), ValueError, f"{FACTOR} nan. {USE_ONE}"),
    (lambda: ga.Scale(-INF), ValueError, f"{FACTOR} -inf. {USE_ONE}"),
    (lambda: ga.Scale("2"), TypeError, f"{FACTOR} '2' (str). {USE_ONE}"),
    (lambda: ga.Scale(None), TypeError, f"{FACTOR} None (NoneType). {USE_ONE}"),
    (lambda: ga.Scale(True), TypeError, f"{FACTOR} True (bool). {USE_ONE}"),
    (lambda: ga.Scale(1j), TypeError, f"{FACTOR} 1j (complex). {USE_ONE}"),
    (
        lambda: ga.Scale(np.True_),
        TypeError,
        f"{FACTOR} {np.True_!r} ({type(np.True_).__name__}). {USE_ONE}",
    ),
    (
        lambda: ga.Scale(np.array([1.5, 2.5])),
        TypeError,
        f"{FACTOR} array([1.5, 2.5]) (ndarray). {USE_ONE}",
    ),
    (
        lambda: ga.Scale(np.complex64(1j)),
        TypeError,
        f"{FACTOR} {np.complex64(1j)!r} (complex64). {USE_ONE}",
    ),
    (lambda: ga.ClipByAGC(0.0), ValueError, f"{CLIP_FACTOR} 0.0. {PAPER}"),
    (lambda: ga.ClipByAGC(-0.01), ValueError, f"{CLIP_FACTOR} -0.01. {PAPER}"),
    (lambda: ga.ClipByAGC(INF), ValueError, f"{CLIP_FACTOR} inf. {PAPER}"),
    (lambda: ga.ClipByAGC(True), TypeError, f"{CLIP_FACTOR} True (bool). {PAPER}"),
    (lambda: ga.ClipByAGC("head"), TypeError, f"{CLIP_FACTOR} 'head' (str). {PAPER}"),
    (lambda: ga.ClipByAGC(eps=0.0), ValueError, f"{EPS} 0.0. {PAPER_EPS}"),
    (lambda: ga.ClipByAGC(eps=NAN), ValueError, f"{EPS} nan. {PAPER_EPS}"),
    (lambda: ga.ClipByAGC(eps=None), TypeError, f"{EPS} None (NoneType). {PAPER_EPS}"),
    (
        lambda: ga.ClipByAGC(exclude_head="head"),
        TypeError,
        "ClipByAGC.exclude_head must be True or False; got 'head' (str). The default is True.",
    ),
    (lambda: ga.ClipByAGC(exclude=3), TypeError, f"{EXCLUDE} 3 (int). {NAMES}"),
    (lambda: ga.ClipByAGC(exclude=None), TypeError, f"{EXCLUDE} None (NoneType). {NAMES}"),
    (lambda: ga.ClipByAGC(exclude=["a", 1]), TypeError, f"{EXCLUDE} ('a', 1) (tuple). {NAMES}"),
    (lambda: ga.ClipByAGC(axes=1), TypeError, f"{AXES} 1 (int). {UNITS}"),
    (lambda: ga.ClipByAGC(axes=[("a", (1,))]), TypeError, f"{AXES} [('a', (1,))] (list). {UNITS}"),
    (lambda: ga.ClipByAGC(axes={"a": 1}), TypeError, f"{AXES} {{'a': 1}} (dict). {UNITS}"),
    (
        lambda: ga.ClipByAGC(axes={"a": (1.5,)}),
        TypeError,
        f"{AXES} {{'a': (1.5,)}} (dict). {UNITS}",
    ),
    (lambda: ga.ClipByAGC(axes={1: (0,)}), TypeError, f"{AXES} {{1: (0,)}} (dict). {UNITS}"),
    *[
        (functools.partial(clip, value), error, f"{clip.__name__}.{field} must be {rule}")
        for clip, field in [
            (ga.ClipByGlobalNorm, "max_norm"),
            (ga.ClipByNorm, "max_norm"),
            (ga.ClipByValue, "max_value"),
        ]
        for value, error, rule in [
            (0.0, ValueError, f"a finite number > 0; got 0.0. {NO_CLIP}"),
            (-1.0, ValueError, f"a finite number > 0; got -1.0. {NO_CLIP}"),
            (NAN, ValueError, f"a finite number > 0; got nan. {NO_CLIP}"),
            (INF, ValueError, f"a finite number > 0; got inf. {NO_CLIP}"),
            ("1", TypeError, f"a finite number > 0; got '1' (str). {NO_CLIP}"),
            (None, TypeError, f"a finite number > 0; got None (NoneType). {NO_CLIP}"),
            (True, TypeError, f"a finite number > 0; got True (bool). {NO_CLIP}"),
        ]
    ],
    (lambda: ga.Precision("float16"), ValueError, f"{POLICY} 'float16'. {MIXED}"),
    (lambda: ga.Precision("fp16"), ValueError, f"{POLICY} 'fp16'. {A_POLICY}"),
    (lambda: ga.Precision(None), TypeError, f"{POLICY} None (NoneType). {A_POLICY}"),
    (
        lambda: ga.Precision("float32", initial_scale=0.0),
        ValueError,
        "Precision.initial_scale must be a finite number > 0; got 0.0. The default is 2**15.",
    ),
    (
        lambda: ga.Precision("float32", initial_scale="big"),
        TypeError,
        (
            "Precision.initial_scale must be a finite number > 0; got 'big' (str). "
            "The default is 2**15."
        ),
    ),
    (
        lambda: ga.Precision("float32", dynamic=1),
        TypeError,
        "Precision.dynamic must be True or False; got 1 (int). The default is True.",
    ),
    (
        lambda: ga.Precision("float32", growth_steps=0),
        ValueError,
        "Precision.growth_steps must be an int >= 1; got 0. The default is 2000.",
    ),
    (
        lambda: ga.Precision("float32", growth_steps=1.5),
        TypeError,
        "Precision.growth_steps must be an int >= 1; got 1.5 (float). The default is 2000.",
    ),
    (
        lambda: ga.Precision("float32", keep=3),
        TypeError,
        (
            "Precision.keep must be a tuple of names or globs; got 3 (int). Write ('head',) for one, "
            "or ('block_*',) for all that match."
        ),
    ),
    (
        lambda: ga.BatchNorm("pooled", trainable=False),
        ValueError,
        (
            "BatchNorm.trainable must be True unless mode is 'freeze'; got False. To train neither "
            "gamma nor beta, write BatchNorm('freeze', trainable=False)."
        ),
    ),
    (lambda: ga.BatchNorm("frozen"), ValueError, f"{MODE} 'frozen'. Did you mean 'freeze'?"),
    (lambda: ga.BatchNorm("off"), ValueError, f"{MODE} 'off'. {A_MODE}"),
    (lambda: ga.BatchNorm(None), TypeError, f"{MODE} None (NoneType). {A_MODE}"),
]

INSTANCE = "Write an instance, as ga_transform.Accumulate(steps=8)."

#: A chain that is made of something else than specs.
CHAINS = [
    (lambda: ga.Chain(5), TypeError, f"Chain[0] must be a transform; got 5 (int). {INSTANCE}"),
    (
        lambda: ga.Chain(ga.Scale(2), "agc"),
        TypeError,
        f"Chain[1] must be a transform; got 'agc' (str). {INSTANCE}",
    ),
    (
        lambda: ga.Chain(ga.Scale),
        TypeError,
        f"Chain[0] must be a transform; got <class 'ga_transform.specs.Scale'> (type). {INSTANCE}",
    ),
    (
        lambda: ga.Chain({"steps": 8}),
        TypeError,
        f"Chain[0] must be a transform; got {{'steps': 8}} (dict). {INSTANCE}",
    ),
]


class Undecorated(ga.Transform):
    pass


@attrs.frozen
class Unregistered(ga.Transform):
    pass


@attrs.frozen
class OwnRewrite(ga.Transform):
    role = "rewrite"


SPEC_CLASS = (
    "register_transform spec_class must be a subclass of ga_transform.Transform made with "
    "@attrs.frozen; got"
)
DECORATE = "Write @attrs.frozen above 'class MyTransform(ga_transform.Transform):'."

#: A class that cannot be registered.
REGISTRATIONS = [
    (
        lambda: ga.register_transform(int),
        TypeError,
        f"{SPEC_CLASS} <class 'int'> (type). {DECORATE}",
    ),
    (
        lambda: ga.register_transform(Undecorated),
        TypeError,
        f"{SPEC_CLASS} {Undecorated!r} (type). {DECORATE}",
    ),
    (
        lambda: ga.register_transform(Unregistered()),
        TypeError,
        f"{SPEC_CLASS} Unregistered() (Unregistered). {DECORATE}",
    ),
]

REFUSED = [*SPECS, *CHAINS, *REGISTRATIONS]


@pytest.mark.parametrize(("call", "error", "text"), REFUSED, ids=[row[2] for row in REFUSED])
def test_a_wrong_value_is_refused(call, error, text):
    """A bad value raises ValueError, a wrong type TypeError, with the whole text in one line."""
    with refused(error, text):
        call()


def test_a_long_value_is_cut():
    """A value whose repr is long stands in the error with its first 57 characters."""
    with refused(TypeError, f"{STEPS} [{'0, ' * 18}0,... (list). {EVERY_BATCH}"):
        ga.Accumulate([0] * 100)


def test_a_value_of_several_lines_is_joined():
    """A value whose repr has several lines stands in the error on one."""
    with refused(TypeError, f"{WEIGHTING} array([[1], [2]]) (ndarray). {WEIGHS}"):
        ga.Accumulate(2, weighting=np.array([[1], [2]]))


#: What is accepted: (spec, field, value); its type is Python's own.
ACCEPTED = [
    (ga.Accumulate(1), "steps", 1),
    (ga.Accumulate(np.int64(4)), "steps", 4),
    (ga.Accumulate(np.uint8(4)), "steps", 4),
    (ga.Accumulate({np.int32(0): np.int64(4)}), "steps", {0: 4}),
    (ga.Split(np.int64(4)), "micro_batch_size", 4),
    (ga.Precision("float32", growth_steps=np.int16(7)), "growth_steps", 7),
    (ga.Scale(2), "factor", 2.0),
    (ga.Scale(0), "factor", 0.0),
    (ga.Scale(np.float32(0.5)), "factor", 0.5),
    (ga.Scale(np.int64(-3)), "factor", -3.0),
    (ga.ClipByNorm(np.float64(2)), "max_norm", 2.0),
    (ga.ClipByAGC(exclude="head"), "exclude", ("head",)),
    (ga.ClipByAGC(axes={"a": np.array([0, 1])}), "axes", {"a": (0, 1)}),
]


@pytest.mark.parametrize(("spec", "field", "value"), ACCEPTED, ids=str)
def test_a_right_value_is_accepted(spec, field, value):
    """NumPy's numbers, and ints for floats, are accepted and kept as Python's own."""
    kept = getattr(spec, field)
    assert kept == value
    assert repr(kept) == repr(value)


# ---- conversions ------------------------------------------------------------------------------


def build():
    """A compiled model named "plain" of one layer named "head"."""
    model = tf_keras.Sequential(
        [tf_keras.Input([2]), tf_keras.layers.Dense(1, name="head")], name="plain"
    )
    model.compile("sgd", "mse")
    return model


def state_of(model):
    """What a refused call must leave alone: class, attributes, weights, optimizer."""
    optimizer = model.optimizer
    return (
        type(model),
        sorted(vars(model)),
        [weight.tobytes() for weight in model.get_weights()],
        type(optimizer),
        sorted(vars(optimizer)),
        [variable.numpy().tobytes() for variable in optimizer.variables],
    )


NOTHING = (
    "make_accumulating must be asked for something to do; got nothing. For example accum_steps=8."
)
BOTH = "make_accumulating must be given transforms or shorthands, not both; got transforms and"
ALL_OF_IT = "Put all of it into transforms."
LIST = "make_accumulating.transforms must be a Chain or a list of specs; got"
A_LIST = "For example [Accumulate(steps=8), ClipByAGC()]."
KNOWN = "Known: head, head/bias, head/bias:0, head/kernel, head/kernel:0."

#: Arguments that `make_accumulating` refuses, whatever the model: (arguments, error, text).
ARGUMENTS = [
    ({}, ValueError, NOTHING),
    ({"agc": False}, ValueError, NOTHING),
    ({"transforms": []}, ValueError, NOTHING),
    ({"transforms": ga.Chain()}, ValueError, NOTHING),
    ({"accum_steps": 0}, ValueError, f"{STEPS} 0. {EVERY_BATCH}"),
    ({"accum_steps": False}, TypeError, f"{STEPS} False (bool). {EVERY_BATCH}"),
    ({"accum_steps": "8"}, TypeError, f"{STEPS} '8' (str). Write 8."),
    ({"accum_steps": {1: 8}}, ValueError, f"{SCHEDULE} {{1: 8}}. {FOR_EXAMPLE}"),
    ({"micro_batch_size": 0}, ValueError, f"{ROWS} 0. {FIT}"),
    ({"micro_batch_size": 0.5}, TypeError, f"{ROWS} 0.5 (float). {FIT}"),
    ({"agc": 0}, ValueError, f"{CLIP_FACTOR} 0.0. {PAPER}"),
    ({"agc": "strong"}, TypeError, f"{CLIP_FACTOR} 'strong' (str). {PAPER}"),
    (
        {"agc": np.True_},
        TypeError,
        f"{CLIP_FACTOR} {np.True_!r} ({type(np.True_).__name__}). {PAPER}",
    ),
    ({"precision": "float16"}, ValueError, f"{POLICY} 'float16'. {MIXED}"),
    (
        {"precision": tf_keras.mixed_precision.Policy("mixed_bfloat16")},
        TypeError,
        f"{POLICY} <Policy \"mixed_bfloat16\"> (Policy). Pass its name, 'mixed_bfloat16'.",
    ),
    ({"precision": True}, TypeError, f"{POLICY} True (bool). {A_POLICY}"),
    ({"precision": False}, TypeError, f"{POLICY} False (bool). {A_POLICY}"),
    ({"batch_norm": "pool"}, ValueError, f"{MODE} 'pool'. Did you mean 'pooled'?"),
    ({"batch_norm": True}, TypeError, f"{MODE} True (bool). {A_MODE}"),
    (
        {"transforms": [ga.Accumulate(2)], "accum_steps": 2},
        ValueError,
        f"{BOTH} accum_steps. {ALL_OF_IT}",
    ),
    (
        {"transforms": ga.Chain(ga.Scale(2)), "agc": 0.1, "remainder": "drop"},
        ValueError,
        f"{BOTH} agc, remainder. {ALL_OF_IT}",
    ),
    (
        {"transforms": [], "micro_batch_size": 4},
        ValueError,
        f"{BOTH} micro_batch_size. {ALL_OF_IT}",
    ),
    ({"transforms": ga.Scale(2)}, TypeError, f"{LIST} Scale(factor=2.0) (Scale). {A_LIST}"),
    ({"transforms": "agc"}, TypeError, f"{LIST} 'agc' (str). {A_LIST}"),
    ({"transforms": {"steps": 8}}, TypeError, f"{LIST} {{'steps': 8}} (dict). {A_LIST}"),
    (
        {"transforms": [ga.Scale(2), 8]},
        TypeError,
        f"Chain[1] must be a transform; got 8 (int). {INSTANCE}",
    ),
    (
        {"transforms": [ga.Accumulate(2), ga.Accumulate(4)]},
        ValueError,
        (
            "Chain must hold at most one Accumulate; got two: Accumulate(steps=2) and "
            "Accumulate(steps=4). Keep one."
        ),
    ),
    (
        {"micro_batch_size": 4, "remainder": "carry"},
        ValueError,
        (
            "make_accumulating must be given accum_steps with remainder; got remainder='carry' "
            "alone. Give accum_steps too."
        ),
    ),
    (
        {"accum_steps": 2, "remainder": "keep"},
        ValueError,
        f"{REMAINDER} 'keep'. The default is 'flush'.",
    ),
    (
        {"accum_steps": 2, "whole_batch_loss": True},
        ValueError,
        (
            "make_accumulating must be given micro_batch_size with whole_batch_loss; got "
            "whole_batch_loss=True alone. Give micro_batch_size too."
        ),
    ),
    (
        {"micro_batch_size": 4, "whole_batch_loss": "yes"},
        ValueError,
        (
            "Split.whole_batch_loss must be True, False or 'gathered'; got 'yes'. The default is "
            "False."
        ),
    ),
]

#: Arguments that do not fit the model that `build` makes.
MISFITS = [
    (
        {"transforms": [OwnRewrite(), ga.Accumulate(2)]},
        ValueError,
        (
            "OwnRewrite.role must be 'stage' in a transform of your own; got 'rewrite'. Leave it "
            "out of the class."
        ),
    ),
    (
        {"accum_steps": 2, "precision": ga.Precision("mixed_float16", keep="hed")},
        ValueError,
        (
            "Precision.keep must be names or globs of this model's layers; got 'hed'. Did you "
            "mean 'head'?"
        ),
    ),
    (
        {"transforms": [ga.Accumulate(2), Unregistered()]},
        ValueError,
        (
            "Unregistered must have a function; got none. "
            "Decorate one with ga_transform.register_transform."
        ),
    ),
    (
        {"agc": ga.ClipByAGC(exclude="haed")},
        ValueError,
        (
            "ClipByAGC.exclude must be names or globs of this model's layers or variables; "
            "got 'haed'. Did you mean 'head'?"
        ),
    ),
    (
        {"agc": ga.ClipByAGC(axes={"tail/*": (0,)})},
        ValueError,
        (
            "ClipByAGC.axes must be names or globs of this model's layers or variables; "
            f"got 'tail/*'. {KNOWN}"
        ),
    ),
    (
        {"agc": ga.ClipByAGC(axes={"head/kernel:0": (2,)})},
        ValueError,
        (
            "ClipByAGC.axes['head/kernel:0'] must be axes of head/kernel:0, which has 2; got (2,). "
            "Count them from 0, each once."
        ),
    ),
]

CONVERSIONS = [*ARGUMENTS, *MISFITS]


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
@pytest.mark.parametrize(
    ("arguments", "error", "text"), CONVERSIONS, ids=[str(row[0]) for row in CONVERSIONS]
)
def test_a_refused_conversion_leaves_the_model_as_it_was(arguments, error, text, inplace):
    """Wrong arguments are refused with the whole text before anything of the model is changed."""
    model = build()
    before = state_of(model)
    with refused(error, text):
        ga.make_accumulating(model, **arguments, inplace=inplace)
    assert state_of(model) == before


def test_inplace_is_a_flag():
    """A word where True or False belongs does not convert the model that was given."""
    model = build()
    before = state_of(model)
    text = "make_accumulating.inplace must be True or False; got 'no' (str). The default is False."
    with refused(TypeError, text):
        ga.make_accumulating(model, accum_steps=2, inplace="no")
    assert state_of(model) == before


@pytest.mark.parametrize(
    ("arguments", "error", "text"), ARGUMENTS, ids=[str(row[0]) for row in ARGUMENTS]
)
def test_the_decorator_refuses_at_once(arguments, error, text):
    """The decorator checks its arguments where it stands, before a model is built."""
    with refused(error, text.replace("make_accumulating", "accumulating")):
        ga.accumulating(**arguments)


def test_the_decorator_needs_its_arguments():
    """A decorator without parentheses is told apart from a number of steps."""
    text = (
        f"accumulating.accum_steps must be an int >= 1 or a schedule; got {build!r} (function). "
        "Write the arguments, as @accumulating(accum_steps=8)."
    )
    with refused(TypeError, text):
        ga.accumulating(build)


@pytest.mark.parametrize("given", [lambda: None, build], ids=["None", "a model"])
def test_the_decorator_stands_above_a_function(given):
    """What is decorated must be a function that builds a model, and not the model itself."""
    with pytest.raises(TypeError, match=r"^accumulating.* must .*; got .*\. "):
        ga.accumulating(accum_steps=2)(given())


def test_a_partial_of_a_builder_can_be_decorated():
    """A builder need not have a name of its own."""
    builder = ga.accumulating(accum_steps=2)(functools.partial(build))
    assert builder().transforms == ga.Chain(ga.Accumulate(2))


# ---- models -----------------------------------------------------------------------------------


def keras_model():
    import keras

    return keras.Sequential([keras.layers.Dense(1)])


def of_keras():
    import keras

    return (
        f"got Sequential of the package keras {keras.__version__}. Build it with tf_keras "
        "('import tf_keras' for 'import keras'), or set TF_USE_LEGACY_KERAS=1 before TensorFlow "
        "is imported if it is built with tf.keras."
    )


OPTIMIZER = tf_keras.optimizers.SGD()
PASS_A_MODEL = "Pass a model, as tf_keras.Sequential([...]) returns it."

#: What is no model: (value, error, what follows the rule).
NO_MODELS = {
    "an int": (lambda: 5, lambda: f"got 5 (int). {PASS_A_MODEL}"),
    "nothing": (lambda: None, lambda: f"got None (NoneType). {PASS_A_MODEL}"),
    "a path": (lambda: "model.h5", lambda: f"got 'model.h5' (str). {PASS_A_MODEL}"),
    "a class": (
        lambda: tf_keras.Model,
        lambda: (
            "got <class 'tf_keras.src.engine.training.Model'> (type). "
            "Pass an instance, not the class."
        ),
    ),
    "an optimizer": (
        lambda: OPTIMIZER,
        lambda: f"got {shown(OPTIMIZER)}. Pass the model that is compiled with it.",
    ),
    "a model of another Keras": (keras_model, of_keras),
}


def make(value):
    return ga.make_accumulating(value, accum_steps=2)


def make_in_place(value):
    return ga.make_accumulating(value, accum_steps=2, inplace=True)


def decorate(value):
    def build_it():
        return value

    return ga.accumulating(accum_steps=2)(build_it)()


#: Who takes a model, and the name of that model in an error.
TAKERS = {
    make: "make_accumulating.model",
    make_in_place: "make_accumulating.model",
    decorate: "The model of build_it",
    ga.strip_accumulating: "strip_accumulating.model",
}


@pytest.mark.parametrize("take", TAKERS, ids=lambda take: take.__name__)
@pytest.mark.parametrize("case", NO_MODELS)
def test_what_is_no_model_is_refused(case, take):
    """What is no tf_keras model is named, and a model of another Keras with its version."""
    value, text = NO_MODELS[case]
    with refused(TypeError, f"{TAKERS[take]} must be a tf_keras.Model; {text()}"):
        take(value())


@pytest.mark.parametrize(
    "take", [take for take in TAKERS if take is not ga.strip_accumulating], ids=lambda t: t.__name__
)
def test_a_converted_model_is_refused(take):
    """A model is converted once: the text names it, its chain, and the way back."""
    model = ga.make_accumulating(build(), accum_steps=8, agc=0.02)
    before = state_of(model)
    text = (
        f"{TAKERS[take]} must be a plain model; got 'plain', converted already to "
        "Chain(Accumulate(steps=8) -> ClipByAGC(clip_factor=0.02)). "
        "Call strip_accumulating first."
    )
    with refused(ValueError, text):
        take(model)
    assert state_of(model) == before


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
def test_a_plain_model_cannot_be_stripped(inplace):
    """What was not converted has no way back, and stays what it is."""
    model = build()
    before = state_of(model)
    text = (
        "strip_accumulating.model must be a converted model; got Sequential 'plain'. "
        "It is plain already."
    )
    with refused(ValueError, text):
        ga.strip_accumulating(model, inplace=inplace)
    assert state_of(model) == before
