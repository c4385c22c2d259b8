"""Specs and chains: values that print, compare, serialise, and refuse to be changed."""

import contextlib
import copy
import functools
import json
import pathlib
import pickle
import re
import subprocess
import sys

import attrs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ga_transform as ga

#: Every kind of spec, with nothing left at its default.
SPECS = {
    "Precision": ga.Precision("mixed_float16", 1024.0, dynamic=False, growth_steps=10, keep="head"),
    "BatchNorm": ga.BatchNorm("freeze", trainable=False),
    "Split": ga.Split(32, whole_batch_loss=True),
    "Accumulate": ga.Accumulate(8, "equal", "carry", "micro_batch"),
    "Scale": ga.Scale(-0.5),
    "ClipByAGC": ga.ClipByAGC(
        0.02, 1e-4, exclude_head=False, exclude=("head", "*/bias:0"), axes={"embedding/*": (1,)}
    ),
    "ClipByGlobalNorm": ga.ClipByGlobalNorm(1.0),
    "ClipByNorm": ga.ClipByNorm(2.0),
    "ClipByValue": ga.ClipByValue(0.5),
}

#: Specs whose fields have more than one shape, on top of those above.
MORE_SPECS = {
    "a schedule": ga.Accumulate({0: 1, 1000: 8}),
    "no axes at all": ga.ClipByAGC(axes={"*": (), "head/*": (0, -1)}),
    "only defaults": ga.ClipByAGC(),
}


def config_of(kind, **fields):
    """A chain's config, of one transform."""
    return {"version": 1, "transforms": [{"kind": kind, "version": 1, **fields}]}


def through_json(chain):
    return ga.Chain.from_config(json.loads(json.dumps(chain.to_config(), allow_nan=False)))


@contextlib.contextmanager
def refused(error, text):
    """The block raises exactly this error, with exactly this text."""
    with pytest.raises(Exception) as caught:  # noqa: PT011
        yield
    assert (caught.type, str(caught.value)) == (error, text)


@attrs.frozen
class Shrink(ga.Transform):
    """A transform of a user's own, which the tests register or do not."""

    factor: float = 0.5
    only: str = "kernel"


# ---- TensorFlow stays out ---------------------------------------------------------------------


def in_a_process(script):
    """What a new interpreter prints, and how it ends."""
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=pathlib.Path(ga.__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )


def test_specs_and_chains_do_without_tensorflow():
    """Making, printing and saving every spec imports no TensorFlow and no Keras."""
    # What slices leave out does not go with the loss of a whole batch.
    apart = ", ".join(f"ga.{spec!r}" for name, spec in SPECS.items() if name != "Accumulate")
    script = f"""
import json, sys
import ga_transform as ga
for chain in ga.Chain({apart}), ga.Chain(ga.{SPECS["Accumulate"]!r}):
    assert ga.Chain.from_config(json.loads(json.dumps(chain.to_config()))) == chain
    dir(ga), repr(chain), hash(chain)
print([name for name in ("tensorflow", "tf_keras", "keras") if name in sys.modules])
"""
    run = in_a_process(script)
    assert (run.stdout, run.stderr) == ("[]\n", "")


@pytest.mark.parametrize("name", ["explain", "register_transform"])
def test_whatever_is_used_first_may_be_what_imports_tf_keras(name):
    """tf_keras's import makes files loadable, in the midst of which nothing may be half made."""
    script = (
        f"import sys, ga_transform as ga; ga.{name}; print('ga_transform.saving' in sys.modules)"
    )
    run = in_a_process(script)
    assert run.stdout == "True\n", run.stderr


def test_the_table_holds_every_kind_of_spec():
    """A spec that is public stands in this table, so that every law below is run on it."""
    public = {
        name
        for name in ga.__all__
        if isinstance(getattr(ga, name), type)
        and issubclass(getattr(ga, name), ga.Transform)
        and name != "Transform"
    }
    assert set(SPECS) == {type(spec).__name__ for spec in SPECS.values()} == public


# ---- printing ---------------------------------------------------------------------------------


def rows(batch):
    return len(batch[0])


class Rows:
    """A callable without a name of its own."""

    def __call__(self, batch):
        return len(batch[0])

    def __repr__(self):
        return "Rows()"


PRINTED = [
    (ga.Accumulate(8), "Accumulate(steps=8)"),
    (ga.Accumulate({0: 1, 1000: 8}), "Accumulate(steps={0: 1, 1000: 8})"),
    (ga.Accumulate(8, remainder="flush"), "Accumulate(steps=8)"),
    (ga.Accumulate(8, remainder="carry"), "Accumulate(steps=8, remainder='carry')"),
    (ga.Accumulate(8, weighting="equal"), "Accumulate(steps=8, weighting='equal')"),
    (ga.Accumulate(8, weighting=rows), "Accumulate(steps=8, weighting=rows)"),
    (ga.Accumulate(8, weighting=Rows()), "Accumulate(steps=8, weighting=Rows())"),
    (ga.Split(32), "Split(micro_batch_size=32)"),
    (ga.Split(32, True), "Split(micro_batch_size=32, whole_batch_loss=True)"),
    (ga.Scale(2), "Scale(factor=2.0)"),
    (ga.ClipByAGC(), "ClipByAGC()"),
    (ga.ClipByAGC(0.01, exclude_head=True), "ClipByAGC()"),
    (ga.ClipByAGC(0.02, exclude="head"), "ClipByAGC(clip_factor=0.02, exclude=('head',))"),
    (ga.ClipByAGC(axes={"a/*": [1]}), "ClipByAGC(axes={'a/*': (1,)})"),
    (ga.ClipByGlobalNorm(1), "ClipByGlobalNorm(max_norm=1.0)"),
    (ga.ClipByNorm(1), "ClipByNorm(max_norm=1.0)"),
    (ga.ClipByValue(1), "ClipByValue(max_value=1.0)"),
    (ga.Precision("float32"), "Precision(policy='float32')"),
    (ga.Precision("float32", dynamic=False), "Precision(policy='float32', dynamic=False)"),
    (ga.BatchNorm("keep"), "BatchNorm(mode='keep')"),
]


@pytest.mark.parametrize(("spec", "text"), PRINTED, ids=[text for _, text in PRINTED])
def test_a_spec_prints_what_it_requires_and_what_is_not_its_default(spec, text):
    """Printing shows required fields and those that differ from their defaults, no others."""
    assert str(spec) == text
    assert repr(ga.Chain(spec)) == f"Chain({text})"


def test_a_chain_prints_its_specs_with_arrows():
    """Specs stand in the order in which they act."""
    assert repr(ga.Chain(ga.Accumulate(8), ga.ClipByAGC(0.02))) == (
        "Chain(Accumulate(steps=8) -> ClipByAGC(clip_factor=0.02))"
    )
    assert repr(ga.Chain()) == "Chain()"


# ---- equality, hash, immutability -------------------------------------------------------------


SAME = {
    "NumPy's int": (ga.Accumulate(8), ga.Accumulate(np.int64(8))),
    "a default that is written out": (ga.Accumulate(8), ga.Accumulate(8, remainder="flush")),
    "an int for a float": (ga.Scale(2), ga.Scale(2.0)),
    "one name for a tuple of names": (ga.ClipByAGC(exclude="a"), ga.ClipByAGC(exclude=["a"])),
    "a list of axes": (ga.ClipByAGC(axes={"a": [0]}), ga.ClipByAGC(axes={"a": (0,)})),
    "a schedule in another order": (ga.Accumulate({0: 1, 9: 2}), ga.Accumulate({9: 2, 0: 1})),
}

DIFFERENT = {
    "a field": (ga.Accumulate(8), ga.Accumulate(4)),
    "a field that has a default": (ga.Accumulate(8), ga.Accumulate(8, remainder="drop")),
    "the class": (ga.ClipByNorm(1.0), ga.ClipByGlobalNorm(1.0)),
    "a schedule": (ga.Accumulate(8), ga.Accumulate({0: 8})),
}


@pytest.mark.parametrize("case", SAME)
def test_equal_specs_make_equal_chains(case):
    """Specs of equal fields are equal and hash alike, and so do their chains."""
    left, right = SAME[case]
    assert left == right
    assert hash(left) == hash(right)
    assert ga.Chain(left) == ga.Chain(right)
    assert hash(ga.Chain(left)) == hash(ga.Chain(right))


@pytest.mark.parametrize("case", DIFFERENT)
def test_different_specs_make_different_chains(case):
    """One field, or the class, tells specs and chains apart."""
    left, right = DIFFERENT[case]
    assert left != right
    assert ga.Chain(left) != ga.Chain(right)


def test_a_chain_is_its_specs_in_order():
    """A chain is made of arguments, a list, a tuple or a chain, and order tells chains apart."""
    specs = [ga.Scale(2.0), ga.ClipByNorm(1.0)]
    chain = ga.Chain(*specs)
    assert chain == ga.Chain(specs) == ga.Chain(tuple(specs)) == ga.Chain(chain)
    assert list(chain) == specs == [chain[0], chain[1]]
    assert len(chain) == 2
    for other in (ga.Chain(specs[::-1]), ga.Chain(specs[0]), tuple(specs), repr(chain)):
        assert chain != other


@pytest.mark.parametrize("kind", SPECS)
def test_a_spec_cannot_be_changed(kind):
    """No field of a spec can be set or deleted."""
    spec = SPECS[kind]
    for field in attrs.fields(type(spec)):
        with pytest.raises(attrs.exceptions.FrozenInstanceError):
            setattr(spec, field.name, getattr(spec, field.name))
        with pytest.raises(attrs.exceptions.FrozenInstanceError):
            delattr(spec, field.name)


@pytest.mark.parametrize(
    "change",
    [
        lambda chain: setattr(chain, "_transforms", ()),
        lambda chain: setattr(chain, "steps", 3),
        lambda chain: delattr(chain, "_transforms"),
    ],
    ids=["set", "add", "delete"],
)
def test_a_chain_cannot_be_changed(change):
    """No attribute of a chain can be set, added or deleted."""
    chain = ga.Chain(ga.Scale(2.0))
    with refused(AttributeError, "a Chain cannot be changed; make another"):
        change(chain)
    assert list(chain) == [ga.Scale(2.0)]


@pytest.mark.parametrize(
    "change",
    [
        lambda steps: steps.update({5: 5}),
        lambda steps: steps.__setitem__(0, 5),
        lambda steps: steps.__delitem__(0),
        lambda steps: steps.__ior__({5: 5}),
        lambda steps: steps.clear(),
        lambda steps: steps.pop(0),
        lambda steps: steps.popitem(),
        lambda steps: steps.setdefault(5, 5),
    ],
)
def test_a_mapping_in_a_spec_cannot_be_changed(change):
    """A schedule refuses every method that would change a dict."""
    spec = ga.Accumulate({0: 1, 1000: 8})
    with refused(TypeError, "a spec cannot be changed; use attrs.evolve to make another"):
        change(spec.steps)
    assert spec.steps == {0: 1, 1000: 8}


def test_a_spec_keeps_no_hold_on_what_it_was_given():
    """Changing the dict or the list that a spec was made of does not change the spec."""
    schedule, names, axes = {0: 1}, ["head"], {"a": [0]}
    accumulate, clip = ga.Accumulate(schedule), ga.ClipByAGC(exclude=names, axes=axes)
    schedule[0], names[0] = 7, "tail"
    axes["a"].append(1)
    assert accumulate == ga.Accumulate({0: 1})
    assert clip == ga.ClipByAGC(exclude=["head"], axes={"a": [0]})


def test_evolve_checks_as_the_constructor_does():
    """A spec made from another by attrs.evolve obeys the same rules."""
    assert attrs.evolve(ga.Accumulate(8), steps=4) == ga.Accumulate(4)
    text = "Accumulate.steps must be an int >= 1; got 0. Use 1 to update on every batch."
    with refused(ValueError, text):
        attrs.evolve(ga.Accumulate(8), steps=0)


@pytest.mark.parametrize(
    "again",
    [
        copy.copy,
        copy.deepcopy,
        lambda chain: pickle.loads(pickle.dumps(chain)),
        lambda chain: pickle.loads(pickle.dumps(chain, protocol=2)),
    ],
    ids=["copy", "deepcopy", "pickle", "pickle 2"],
)
@pytest.mark.parametrize("spec", {**SPECS, **MORE_SPECS}.values(), ids=str)
def test_copies_and_pickles_are_equal(spec, again):
    """A copy or an unpickled chain equals its source, hashes alike and prints the same."""
    for chain in (ga.Chain(), ga.Chain(spec), ga.Chain(spec, ga.Scale(1.0))):
        assert again(chain) == chain
        assert hash(again(chain)) == hash(chain)
        assert repr(again(chain)) == repr(chain)


# ---- order ------------------------------------------------------------------------------------

ACCUMULATE, SPLIT, SCALE = ga.Accumulate(2), ga.Split(4), ga.Scale(2.0)
PRECISION, BATCH_NORM = ga.Precision("float32"), ga.BatchNorm("keep")

IN_ORDER = {
    "nothing": [],
    "everything": [PRECISION, BATCH_NORM, SPLIT, SCALE, ACCUMULATE, SCALE],
    "rewrites in either order": [BATCH_NORM, PRECISION, ACCUMULATE],
    "stages alone": [SCALE, ga.ClipByNorm(1.0), SCALE],
    "a split alone": [SPLIT],
}

SPLIT_RULE = "Chain must hold Split before Accumulate and every stage; got Split after "
REWRITE_RULE = "Chain must hold rewrites before stages; got "

OUT_OF_ORDER = [
    ([SCALE, PRECISION], f"{REWRITE_RULE}Precision after Scale. Move Precision to the front."),
    ([SPLIT, PRECISION], f"{REWRITE_RULE}Precision after Split. Move Precision to the front."),
    (
        [PRECISION, SCALE, ACCUMULATE, BATCH_NORM],
        f"{REWRITE_RULE}BatchNorm after Accumulate. Move BatchNorm to the front.",
    ),
    ([ACCUMULATE, SPLIT], f"{SPLIT_RULE}Accumulate. Move Split before Accumulate."),
    ([SCALE, SPLIT], f"{SPLIT_RULE}Scale. Move Split before Scale."),
    ([PRECISION, SCALE, ACCUMULATE, SPLIT], f"{SPLIT_RULE}Accumulate. Move Split before Scale."),
    (
        [ACCUMULATE, SCALE, ga.Accumulate(4, remainder="drop")],
        (
            "Chain must hold at most one Accumulate; got two: Accumulate(steps=2) and "
            "Accumulate(steps=4, remainder='drop'). Keep one."
        ),
    ),
    (
        [SPLIT, SPLIT],
        (
            "Chain must hold at most one Split; got two: Split(micro_batch_size=4) and "
            "Split(micro_batch_size=4). Keep one."
        ),
    ),
    (
        [PRECISION, ga.Precision("mixed_float16")],
        (
            "Chain must hold at most one Precision; got two: Precision(policy='float32') and "
            "Precision(policy='mixed_float16'). Keep one."
        ),
    ),
    (
        [BATCH_NORM, PRECISION, BATCH_NORM],
        (
            "Chain must hold at most one BatchNorm; got two: BatchNorm(mode='keep') and "
            "BatchNorm(mode='keep'). Keep one."
        ),
    ),
]


@pytest.mark.parametrize("case", IN_ORDER)
def test_a_right_order_is_kept(case):
    """Rewrites, then a split, then stages around one accumulation: the chain holds them so."""
    assert list(ga.Chain(IN_ORDER[case])) == IN_ORDER[case]


@pytest.mark.parametrize(("specs", "text"), OUT_OF_ORDER, ids=[text for _, text in OUT_OF_ORDER])
def test_a_wrong_order_is_refused(specs, text):
    """What stands in the wrong place, or stands twice, is named with what to do about it."""
    with refused(ValueError, text):
        ga.Chain(specs)


def test_a_transform_that_borrows_a_name_is_no_second_one():
    """What may stand once is told by its class, not by the name a user's own class shares."""

    @attrs.frozen
    class Accumulate(ga.Transform):
        pass

    assert len(ga.Chain(Accumulate(), ga.Accumulate(2))) == 2


def test_accumulate_parts_the_stages():
    """Stages before it act on each micro-batch, those after it on each update."""
    before, after = ga.ClipByNorm(1.0), ga.ClipByValue(1.0)
    chain = ga.Chain(PRECISION, SPLIT, before, ACCUMULATE, after, SCALE)
    assert chain.micro_batch_stages == (before,)
    assert chain.update_stages == (after, SCALE)
    assert chain.find(ga.Accumulate) == ACCUMULATE
    assert chain.find(ga.BatchNorm) is None


def test_without_accumulate_all_stages_act_on_the_update():
    """A chain of stages alone has none that act on micro-batches."""
    chain = ga.Chain(SPLIT, SCALE, ga.ClipByNorm(1.0))
    assert chain.micro_batch_stages == ()
    assert chain.update_stages == (SCALE, ga.ClipByNorm(1.0))


# ---- to JSON and back -------------------------------------------------------------------------


@pytest.mark.parametrize("spec", {**SPECS, **MORE_SPECS}.values(), ids=str)
def test_every_spec_survives_json(spec):
    """What comes back from JSON equals the chain that went in, and its repr is the same."""
    chain = ga.Chain(spec)
    assert through_json(chain) == chain == ga.Chain.from_config(chain.to_config())
    assert repr(through_json(chain)[0]) == repr(spec)


def test_numpy_numbers_survive_json():
    """Counts and numbers given as NumPy's become JSON's own."""
    chain = ga.Chain(
        ga.Split(np.int32(4)),
        ga.Accumulate({np.int64(0): np.uint8(1), np.int64(9): np.int16(2)}),
        ga.Scale(np.float32(0.5)),
        ga.ClipByAGC(axes={"a": np.array([0, 1])}),
    )
    assert through_json(chain) == chain
    assert repr(through_json(chain)) == repr(chain)


def test_a_config_is_the_fields_with_versions():
    """A config holds the version, the kind and every field, and nothing else."""
    assert ga.Chain(ga.Accumulate({0: 1, 9: 2}), ga.Scale(2.0)).to_config() == {
        "version": 1,
        "transforms": [
            {
                "kind": "Accumulate",
                "version": 1,
                "steps": {"0": 1, "9": 2},
                "weighting": "exact",
                "remainder": "flush",
                "on_nonfinite": "window",
            },
            {"kind": "Scale", "version": 1, "factor": 2.0},
        ],
    }


def test_a_field_with_a_default_may_be_missing():
    """A config of before a field was added gets that field's default."""
    assert ga.Chain.from_config(config_of("Accumulate", steps=2)) == ga.Chain(ga.Accumulate(2))


BUILT_IN = ", ".join(sorted(SPECS)[:10])  # so many are listed
KIND_RULE = "Chain.from_config kind must be a registered transform; got "
NEEDS_A_LIST = "Chain.from_config must be given a dict with a list of transforms; got "
NEEDS_A_DICT = "Chain.from_config must be given one dict a transform; got "
PASS_IT = "Pass what Chain.to_config returned."
LATER = "Load it with the later ga_transform that wrote it."

BROKEN_CONFIGS = [
    (None, TypeError, f"{NEEDS_A_LIST}None (NoneType). {PASS_IT}"),
    ([], TypeError, f"{NEEDS_A_LIST}[] (list). {PASS_IT}"),
    ({}, TypeError, f"{NEEDS_A_LIST}{{}} (dict). {PASS_IT}"),
    (
        {"version": 1, "transforms": None},
        TypeError,
        f"{NEEDS_A_LIST}{{'version': 1, 'transforms': None}} (dict). {PASS_IT}",
    ),
    (
        {"version": 2, "transforms": []},
        ValueError,
        f"Chain config version must be an int from 1 to 1; got 2. {LATER}",
    ),
    ({"version": 1, "transforms": [3]}, TypeError, f"{NEEDS_A_DICT}3 (int). {PASS_IT}"),
    ({"version": 1, "transforms": ["Scale"]}, TypeError, f"{NEEDS_A_DICT}'Scale' (str). {PASS_IT}"),
    (
        {"version": 1, "transforms": [{"kind": "Scale", "version": 2, "factor": 2.0}]},
        ValueError,
        f"Scale config version must be an int from 1 to 1; got 2. {LATER}",
    ),
    (
        config_of("Acumulate", steps=2),
        ValueError,
        f"{KIND_RULE}'Acumulate'. Did you mean 'Accumulate'?",
    ),
    (config_of("ClipByNrm"), ValueError, f"{KIND_RULE}'ClipByNrm'. Did you mean 'ClipByNorm'?"),
    (
        config_of("nobody>Acumulate"),
        ValueError,
        (
            f"{KIND_RULE}'nobody>Acumulate'. Did you mean 'Accumulate'? "
            "A transform of your own must be registered before it is loaded."
        ),
    ),
    (
        config_of("Accumulate", stepz=2),
        ValueError,
        "Accumulate has no field 'stepz' (str). Did you mean 'steps'?",
    ),
    (
        config_of("Scale", factor=2.0, quux=1),
        ValueError,
        "Scale has no field 'quux' (str). Known: factor.",
    ),
    (
        config_of("Accumulate", remainder="flush"),
        ValueError,
        "Accumulate.steps must be given; got nothing. Add it to the config.",
    ),
    (
        config_of("Precision"),
        ValueError,
        "Precision.policy must be given; got nothing. Add it to the config.",
    ),
]


@pytest.mark.parametrize(
    ("config", "error", "text"), BROKEN_CONFIGS, ids=[text for *_, text in BROKEN_CONFIGS]
)
def test_a_broken_config_is_refused(config, error, text):
    """A config of another shape, version, kind or field is named, with the nearest right one."""
    with refused(error, text):
        ga.Chain.from_config(config)


@pytest.mark.parametrize("kind", ["Zzz", "", "Transform", "FrozenDict", "Chain", None, 7])
def test_only_registered_kinds_are_read(kind):
    """Nothing but a registered transform can be named by a config; the known ones are listed."""
    # A transform that another test has registered may be listed after these.
    listed = re.escape(f"{KIND_RULE}{kind!r}. Known: {BUILT_IN}")
    with pytest.raises(ValueError, match=rf"^{listed}[^\n]*\.$"):
        ga.Chain.from_config(config_of(kind))


@pytest.mark.parametrize("version", [None, 0, -1, 1.0, "1", True, [1]])
def test_a_version_is_an_int_from_one(version):
    """Missing and malformed versions are refused, of the chain and of each transform."""
    rule = re.escape(f"config version must be an int from 1 to 1; got {version!r}. ")
    with pytest.raises(ValueError, match=f"^Chain {rule}"):
        ga.Chain.from_config({"version": version, "transforms": []})
    with pytest.raises(ValueError, match=f"^Scale {rule}"):
        ga.Chain.from_config({"version": 1, "transforms": [{"kind": "Scale", "version": version}]})


#: Values that a file may hold and no constructor accepts: (kind, fields).
FORGED = [
    ("Accumulate", {"steps": 0}),
    ("Accumulate", {"steps": True}),
    ("Accumulate", {"steps": "4"}),
    ("Accumulate", {"steps": None}),
    ("Accumulate", {"steps": 2, "weighting": "rows"}),
    ("Accumulate", {"steps": 2, "weighting": 3}),
    ("Accumulate", {"steps": 2, "remainder": "keep"}),
    ("Accumulate", {"steps": 2, "on_nonfinite": None}),
    ("Split", {"micro_batch_size": -1}),
    ("Split", {"micro_batch_size": 4, "whole_batch_loss": 1}),
    ("Scale", {"factor": float("nan")}),
    ("Scale", {"factor": float("inf")}),
    ("Scale", {"factor": "2"}),
    ("ClipByAGC", {"clip_factor": 0}),
    ("ClipByAGC", {"eps": None}),
    ("ClipByAGC", {"exclude_head": "yes"}),
    ("ClipByAGC", {"exclude": 3}),
    ("ClipByAGC", {"axes": {"a": "b"}}),
    ("ClipByGlobalNorm", {"max_norm": -1.0}),
    ("ClipByNorm", {"max_norm": 0.0}),
    ("ClipByValue", {"max_value": False}),
    ("Precision", {"policy": "float16"}),
    ("Precision", {"policy": "float32", "growth_steps": 0.5}),
    ("BatchNorm", {"mode": "frozen"}),
    ("Scale", {"factor": 10**400}),
]


@pytest.mark.parametrize(("kind", "fields"), FORGED, ids=lambda value: str(value)[:50])
def test_a_forged_value_is_refused_as_if_typed_by_hand(kind, fields):
    """A config's value is checked by the rule of its field, with that rule's own words."""
    with pytest.raises((TypeError, ValueError)) as typed:
        getattr(ga, kind)(**fields)
    assert str(typed.value).startswith(f"{kind}.{list(fields)[-1]} must be ")
    with refused(typed.type, str(typed.value)):
        ga.Chain.from_config(config_of(kind, **fields))


@pytest.mark.parametrize(
    "schedule", [{}, {"1": 4}, {"0": 0}, {"-1": 4, "0": 1}, {"0": 2.5}, {"x": 1}]
)
def test_a_forged_schedule_is_refused(schedule):
    """The keys of a schedule in a config are the digits of updates, from 0 on."""
    rule = "Accumulate.steps must be a schedule {update: steps} that starts at update 0; got {"
    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(rule)}"):
        ga.Chain.from_config(config_of("Accumulate", steps=schedule))


def test_order_is_checked_on_loading():
    """A config whose transforms stand in a wrong order is refused as the constructor would."""
    config = ga.Chain(SPLIT, ACCUMULATE).to_config()
    config["transforms"].reverse()
    with refused(ValueError, f"{SPLIT_RULE}Accumulate. Move Split before Accumulate."):
        ga.Chain.from_config(config)


# ---- weighting functions ----------------------------------------------------------------------


def test_a_registered_weighting_is_saved_by_its_name():
    """A function that tf_keras knows is written as its name, and is the same function again."""
    import tf_keras

    registered = tf_keras.utils.register_keras_serializable("test_chain", "row_count")(
        lambda batch: len(batch[0])
    )
    chain = ga.Chain(ga.Accumulate(2, weighting=registered))
    assert chain.to_config()["transforms"][0]["weighting"] == {"registered": "test_chain>row_count"}
    assert through_json(chain) == chain
    assert through_json(chain)[0].weighting is registered


@pytest.mark.parametrize(
    "weighting", [rows, Rows(), functools.partial(rows)], ids=["function", "object", "partial"]
)
def test_an_unregistered_weighting_cannot_be_saved(weighting):
    """Any callable makes a chain; to save one that is not registered is refused with the remedy."""
    chain = ga.Chain(ga.Accumulate(2, weighting=weighting))
    text = (
        f"Accumulate.weighting must be registered to be saved; got {weighting!r} "
        f"({type(weighting).__name__}). "
        "Decorate it with tf_keras.utils.register_keras_serializable()."
    )
    with refused(ValueError, text):
        chain.to_config()


def test_an_unregistered_weighting_trains():
    """A model trains with a weighting that could not be saved."""
    import tf_keras

    model = tf_keras.Sequential([tf_keras.Input([2]), tf_keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    model = ga.make_accumulating(
        model, transforms=[ga.Accumulate(2, weighting=lambda batch: batch[0].shape[0])]
    )
    before = model.get_weights()[0]
    model.fit(np.ones([8, 2]), np.ones([8, 1]), batch_size=2, verbose=0)
    assert int(model.optimizer.iterations) == 2
    assert np.any(model.get_weights()[0] != before)


@pytest.mark.parametrize("name", ["nobody>nothing", None, 3])
def test_a_weighting_that_is_not_registered_here_is_refused(name):
    """A config that names an unknown function says how to make it known."""
    text = (
        f"Accumulate.weighting must be a function that is registered here; got {name!r}. "
        "Import the module that registers it before loading."
    )
    with refused(ValueError, text):
        ga.Chain.from_config(config_of("Accumulate", steps=2, weighting={"registered": name}))


# ---- transforms of a user's own ---------------------------------------------------------------


def register(spec_class, package="test_chain"):
    ga.register_transform(spec_class, package=package)(
        lambda spec, gradients, variables, model: gradients
    )
    return spec_class


def test_a_registered_transform_survives_json():
    """A user's own transform is saved under its package and comes back equal."""

    @attrs.frozen
    class Own(ga.Transform):
        depth: int

    register(Own)
    chain = ga.Chain(ga.Accumulate(2), Own(depth=3))
    assert chain.to_config()["transforms"][1] == {
        "kind": "test_chain>Own",
        "version": 1,
        "depth": 3,
    }
    assert through_json(chain) == chain
    assert repr(through_json(chain)) == "Chain(Accumulate(steps=2) -> Own(depth=3))"


def test_an_unregistered_transform_cannot_be_saved():
    """A user's own transform that was not registered prints, copies, and refuses to be saved."""
    chain = ga.Chain(Shrink(0.25))
    assert repr(chain) == "Chain(Shrink(factor=0.25))"
    assert pickle.loads(pickle.dumps(chain)) == copy.deepcopy(chain) == chain
    text = (
        "Shrink must be registered to be saved; got an unregistered class. "
        "Pass it to ga_transform.register_transform."
    )
    with refused(ValueError, text):
        chain.to_config()


def test_a_transform_that_is_defined_again_takes_the_place_of_the_first():
    """A config loads as the class that was registered last under its name."""

    def define():
        @attrs.frozen
        class Twice(ga.Transform):
            pass

        return register(Twice)

    first, second = define(), define()
    assert type(through_json(ga.Chain(second()))[0]) is second is not first


@attrs.frozen
class WithTuple(ga.Transform):
    axes: tuple = (0, 1)


@attrs.frozen
class WithPrivateName(ga.Transform):
    _depth: int = 3


@attrs.frozen
class WithDerivedField(ga.Transform):
    depth: int = 3
    twice: int = attrs.field(init=False, default=attrs.Factory(lambda s: 2 * s.depth, True))


@attrs.frozen
class WithKeywordOnly(ga.Transform):
    depth: int = attrs.field(kw_only=True)


@attrs.frozen
class WithMapping(ga.Transform):
    depths: dict = attrs.field(factory=dict, hash=False)


@pytest.mark.parametrize(
    "spec",
    [
        WithTuple((2,)),
        WithPrivateName(4),
        WithDerivedField(4),
        WithKeywordOnly(depth=4),
        WithMapping({"a": 1}),
    ],
    ids=lambda spec: type(spec).__name__,
)
def test_every_way_to_declare_a_field_survives_json(spec):
    """Whatever attrs allows of a field, a registered transform prints and comes back equal."""
    register(type(spec))
    assert str(spec).startswith(type(spec).__name__ + "(")
    assert through_json(ga.Chain(spec)) == ga.Chain(spec)


# ---- properties -------------------------------------------------------------------------------

PROPERTY = settings(max_examples=100, deadline=None)

counts = st.integers(1, 2**70)
finite = st.floats(allow_nan=False, allow_infinity=False)
positive = st.floats(0, exclude_min=True, allow_infinity=False)
schedules = st.tuples(counts, st.dictionaries(st.integers(0, 2**70), counts)).map(
    lambda drawn: {0: drawn[0], **drawn[1]}
)
axes = st.lists(st.integers(-9, 9)).map(tuple)

rewrites = {
    "Precision": st.builds(
        ga.Precision,
        policy=st.sampled_from(["mixed_float16", "mixed_bfloat16", "float32"]),
        initial_scale=positive,
        dynamic=st.booleans(),
        growth_steps=counts,
        keep=st.lists(st.text()),
    ),
    "BatchNorm": st.builds(ga.BatchNorm, st.sampled_from(["keep", "momentum", "pooled", "freeze"])),
}
splits = st.builds(ga.Split, counts, st.booleans())
accumulates = st.builds(
    ga.Accumulate,
    steps=counts | schedules,
    weighting=st.sampled_from(["exact", "equal"]),
    remainder=st.sampled_from(["flush", "carry", "drop"]),
    on_nonfinite=st.sampled_from(["window", "micro_batch"]),
)
stages = st.one_of(
    st.builds(ga.Scale, finite),
    st.builds(ga.ClipByGlobalNorm, positive),
    st.builds(ga.ClipByNorm, positive),
    st.builds(ga.ClipByValue, positive),
    st.builds(
        ga.ClipByAGC,
        clip_factor=st.just(0.01) | positive,
        eps=st.just(1e-3) | positive,
        exclude_head=st.booleans(),
        exclude=st.lists(st.text()),
        axes=st.dictionaries(st.text(), axes),
    ),
)
any_spec = st.one_of(*rewrites.values(), splits, accumulates, stages)


@st.composite
def chains(draw):
    """Some rewrites in any order, perhaps a split, stages, perhaps an accumulation, stages."""
    specs = [draw(rewrites[name]) for name in draw(st.permutations(list(rewrites)))]
    specs = specs[draw(st.integers(0, len(specs))) :]
    split = draw(st.lists(splits, max_size=1))
    # A slice has no loss of its own where the loss is that of the whole batch.
    is_whole = bool(split and split[0].whole_batch_loss)
    specs += split + draw(st.lists(stages, max_size=0 if is_whole else 3))
    accumulate = draw(st.lists(accumulates, max_size=1))
    if is_whole:
        accumulate = [attrs.evolve(each, on_nonfinite="window") for each in accumulate]
    return ga.Chain(specs + accumulate + draw(st.lists(stages, max_size=3)))


@PROPERTY
@given(chains())
def test_any_chain_survives_json(chain):
    """A chain that went through JSON is equal, hashes alike and has the same repr."""
    again = through_json(chain)
    assert again == chain
    assert hash(again) == hash(chain)
    assert repr(again) == repr(chain)
    assert [repr(spec) for spec in again] == [repr(spec) for spec in chain]


@PROPERTY
@given(any_spec)
def test_a_chain_of_one_prints_its_spec(spec):
    """The repr of a chain of one is the spec as it prints, in brackets."""
    assert repr(ga.Chain(spec)) == f"Chain({spec})"


@PROPERTY
@given(any_spec)
def test_what_a_spec_prints_makes_it_again(spec):
    """Both the short and the long text of a spec are Python that makes an equal one."""
    assert eval(str(spec), vars(ga).copy()) == spec
    assert eval(repr(spec), vars(ga).copy()) == spec


@PROPERTY
@given(chains(), st.data())
def test_chains_are_equal_iff_their_specs_are(chain, data):
    """Equality and hash of chains are those of the sequences of their specs."""
    other = data.draw(
        st.one_of(chains(), st.just(ga.Chain(list(chain))), st.just(ga.Chain(*chain[1:])))
    )
    assert (chain == other) == (list(chain) == list(other))
    assert (chain != other) == (list(chain) != list(other))
    assert chain != other or hash(chain) == hash(other)


@PROPERTY
@given(chains())
def test_loading_leaves_the_config_as_it_is(chain):
    """from_config changes nothing in the dict that it is given."""
    config = chain.to_config()
    before = copy.deepcopy(config)
    ga.Chain.from_config(config)
    assert config == before == chain.to_config()


likely = st.sampled_from([*SPECS, "Acumulate", "x>y", "exact", "flush"]) | st.sampled_from(
    [{"registered": "x"}, {"0": 1}, {"a": [0]}, 0, 1, 2]
)
json_values = st.recursive(
    likely | st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


def places(tree):
    """Every (container, key) of a tree of dicts and lists."""
    keys = list(tree) if isinstance(tree, dict) else range(len(tree))
    for key in keys:
        yield tree, key
        if isinstance(tree[key], (dict, list)):
            yield from places(tree[key])


@st.composite
def broken_configs(draw):
    """The config of a valid chain after one to three mutations."""
    config = draw(chains().filter(len)).to_config()
    for _ in range(draw(st.integers(1, 3))):
        known = list(places(config))
        if not known:
            break
        container, key = draw(st.sampled_from(known))
        mutation = draw(st.sampled_from(["drop", "replace", "replace", "rename"]))
        if mutation == "replace":
            container[key] = copy.deepcopy(draw(json_values))
            continue
        value = container.pop(key)
        if mutation == "rename" and isinstance(container, dict):
            container[draw(st.text() | st.just(f"{key}s"))] = value
    return config


@settings(PROPERTY, max_examples=300)
@given(broken_configs())
def test_a_broken_config_gives_a_chain_or_one_line(config):
    """However a config is broken, it is a right chain or a ValueError or TypeError of one line."""
    try:
        chain = ga.Chain.from_config(config)
    except (TypeError, ValueError) as error:
        assert len(str(error).splitlines()) == 1, error
    else:
        assert through_json(chain) == chain
