"""The three commands, each given what the parser has read."""

from __future__ import annotations

import argparse
import contextlib
import json
import warnings
from pathlib import Path
from typing import Any

import attrs

import ga_transform
from ga_transform.chain import Chain
from ga_transform.cli.files import FORMATS, check_target, format_of, load, save
from ga_transform.cli.speech import Refusal, refusing, report, say
from ga_transform.shorthands import chain_of

__all__ = ["convert", "inspect", "strip"]


def convert(options: argparse.Namespace) -> None:
    """Load a plain model, convert the object itself, and save it."""
    target = check_target(options.source, options.target, options.force)
    chain = _chain(options)
    model = load(options.source, options.unsafe)
    with refusing():
        model = ga_transform.make_accumulating(model, transforms=chain, inplace=True)
    save(model, target, options.force)
    _report_saved(options, target, model, str(chain))


def strip(options: argparse.Namespace) -> None:
    """Load a converted model, turn the object itself back, and save it."""
    target = check_target(options.source, options.target, options.force)
    model = load(options.source, options.unsafe)
    with refusing():
        model = ga_transform.strip_accumulating(model, inplace=True)
    if target.suffix not in FORMATS and model._is_compiled:
        warnings.warn(
            f"{options.target}: tf_keras will load this plain SavedModel with a new optimizer, "
            "whose updates start at 0. Save it as .keras or .h5 to keep the optimizer.",
            stacklevel=2,
        )
    save(model, target, options.force)
    _report_saved(options, target, model, "plain")


def inspect(options: argparse.Namespace) -> None:
    """Load a model, and print what it is."""
    format_name = format_of(options.source)
    model = load(options.source, options.unsafe)
    facts: dict[str, Any] = {"file": str(options.source), "format": format_name}
    facts.update(_facts(model))
    explanation = ga_transform.explain(model) if facts["converted"] else None
    if options.json:
        facts["explanation"] = explanation and attrs.asdict(
            explanation, value_serializer=_serialized
        )
        report(json.dumps(facts, indent=2, default=str))
        return
    facts["chain"] = explanation and explanation.chain
    width = max(map(len, facts))
    lines = []
    for name, fact in facts.items():
        text = "-" if fact is None else ("no", "yes")[fact] if isinstance(fact, bool) else fact
        lines.append(f"{name.replace('_', ' ').ljust(width)}  {text}")
    if explanation is not None:
        lines += ["", str(explanation)]
    report("\n".join(lines))


def _report_saved(options: argparse.Namespace, target: Path, model: Any, what: str) -> None:
    """Tell what is done; it stays done where nobody can be told."""
    if options.quiet:
        return
    with contextlib.suppress(BrokenPipeError):
        try:
            report(f"{options.target}: {format_of(target)} of {_class_of(model)}, {what}")
        except Refusal as refusal:
            say("warning", refusal)


def _facts(model: Any) -> dict[str, Any]:
    """What a model is, in JSON's types."""
    from ga_transform import _keras
    from ga_transform.models import AccumulatingModel
    from ga_transform.optimizer_state import iterations_of

    is_converted = isinstance(model, AccumulatingModel)
    optimizer = getattr(model, "optimizer", None) if model._is_compiled else None
    iterations = iterations_of(optimizer)
    pending = None
    if is_converted:
        # Of the mixin, since a model may use these names itself; or kept for when it is compiled.
        pending = AccumulatingModel.pending_micro_batches.__get__(model)
        pending = pending or model._kept_micro_batches()
    return {
        "class": _class_of(model),
        "name": model.name,
        "weights": sum(variable.shape.num_elements() for variable in _keras.weights_of(model)),
        "compiled": model._is_compiled,
        "optimizer": optimizer and type(optimizer).__name__,
        "updates": None if iterations is None else int(iterations),
        "converted": is_converted,
        "chain": model._accumulating_chain.to_config() if is_converted else None,
        "pending_micro_batches": pending,
    }


def _class_of(model: Any) -> str:
    """The name of the class that a model has, or had before it was converted."""
    from ga_transform.classes import plain_class_of

    return plain_class_of(model).__name__


def _serialized(instance: object, field: object, value: Any) -> Any:
    return value.to_config() if isinstance(value, Chain) else value


def _chain(options: argparse.Namespace) -> Chain:
    """The chain of the file, or else of the shorthands."""
    with refusing():
        chain = None if options.chain is None else _read_chain(options.chain)
        return chain_of(
            "convert",
            chain,
            spelled=lambda name: f"--{'chain' if name == 'transforms' else name.replace('_', '-')}",
            accum_steps=options.accum_steps,
            micro_batch_size=options.micro_batch_size,
            agc=options.agc,
            precision=options.precision,
            batch_norm=options.batch_norm,
            remainder=options.remainder,
            whole_batch_loss=options.whole_batch_loss,
        )


def _read_chain(path: Path) -> Chain:
    with refusing(f"--chain {path} cannot be read", (OSError,)):
        content = path.read_bytes()
    try:
        config = json.loads(content.decode())
    except (RecursionError, ValueError) as error:
        raise Refusal(
            f"--chain must be a file of JSON; got {path}, which is none: {error}"
        ) from error
    return Chain.from_config(config)
