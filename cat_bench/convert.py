"""`cat-bench convert`: the authors' weights to our checkpoint folder, and back.

An architecture takes part where its file exports `from_upstream(tensors) -> tensors` and
`to_upstream(tensors) -> tensors`: dicts of names and tensors, the second the inverse of the first.
docs/baselines.md lists which do, and what maps to what. Every name and shape is checked against the
Config of the spec before anything is written: nothing is padded, cut or left out, and dtypes stay.
What is no floating-point number is refused, what is not finite gets a warning.

Tensors do not tell all: models that differ in an epsilon or a window have the same names and
shapes. So the authors' config.json beside the weights is compared, too, where the file exports

    settings_from_upstream(theirs) -> settings   of Config; ValueError: ours has no such model
    upstream_config(config) -> theirs            for the way back, which writes a config.json
    NOT_IN_SHAPES                                names of theirs, unchecked without a config.json

Try it: cat-bench convert mamba2:vocab_size=50288 path/to/model.safetensors -o checkpoints/mamba2
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from cat_bench import checkpoint
from cat_bench.architecture import build, load_module
from cat_bench.errors import UserError
from cat_bench.messages import warn
from cat_bench.spec import Spec, architectures, parse

if TYPE_CHECKING:
    from torch import Tensor

Tensors = dict[str, "Tensor"]
FLOATS = ("float16", "bfloat16", "float32", "float64")  # float8's scales, beside it, would be lost
INDEX = "model.safetensors.index.json"  # of weights in several files: {"weight_map": {name: file}}


def from_upstream(spec: Spec, source: Path, folder: Path) -> int:
    """Write the checkpoint `folder` of the authors' weights in `source`; how many tensors it has.

    Raises UserError where they do not fit the spec, in names, settings or shapes.
    """
    convert = _exported(spec, "from_upstream")
    checkpoint.check_is_new(folder)
    tensors = _converted(convert, read_tensors(source), source, spec)
    model = build(spec, device="meta")
    _check_settings(spec, source, model.config)
    _check(spec, source, tensors, model.state_dict(), model.config)
    _check_numbers(source, tensors)
    checkpoint.write(folder, tensors, checkpoint.meaning_of(spec, model.config))
    return len(tensors)


def to_upstream(spec: Spec, source: Path, folder: Path) -> int:
    """The way back: `folder` gets model.safetensors with the authors' names, and their config.json
    where the architecture exports it.
    """
    convert = _exported(spec, "to_upstream")
    checkpoint.check_is_new(folder)
    config = build(spec, device="meta").config
    checkpoint.check_config(source, spec, config)
    theirs = _upstream_config(spec, config) if _reads_settings(spec) else None
    tensors = _converted(convert, read_tensors(source), source, spec)
    _check_numbers(source, tensors)
    checkpoint.write(folder, tensors, theirs)
    return len(tensors)


def read_tensors(source: Path) -> Tensors:
    """All tensors of a .safetensors file, or of a folder with one or with several and an index."""
    tensors: Tensors = {}
    for path in _files(source):
        try:
            tensors |= load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{path} cannot be read as safetensors: {error}.",
                "Weights in another format must be saved as safetensors by their own library.",
            ) from error
    return tensors


def _files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    if (source / INDEX).is_file():
        try:
            names = sorted(set(json.loads((source / INDEX).read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(
                f"{source / INDEX} is no index of weights: {type(error).__name__}: {error}.",
                'It holds {"weight_map": {tensor: file}}.',
            ) from error
        return [source / name for name in names]
    if (source / checkpoint.WEIGHTS).is_file():
        return [source / checkpoint.WEIGHTS]
    what = f"lacks {checkpoint.WEIGHTS} and {INDEX}" if source.is_dir() else "does not exist"
    raise UserError(
        f"{source} {what}.",
        f"Give a .safetensors file, or a folder that holds {checkpoint.WEIGHTS} or {INDEX}.",
    )


def _exported(spec: Spec, name: str) -> Callable[[Tensors], Tensors]:
    found = getattr(load_module(spec), name, None)
    if found is None:
        able = [info.name for info in architectures() if name in info.exports]
        raise UserError(
            f"{spec.name} has no map of upstream weights: its file exports no {name}.",
            f"Those that do: {', '.join(able) or 'none yet'}.",
        )
    return found


def _converted(
    convert: Callable[[Tensors], Tensors], tensors: Tensors, source: Path, spec: Spec
) -> Tensors:
    try:
        made = convert(tensors)
    except KeyError as error:
        raise UserError(
            f"{source} lacks the tensor {error}, which {spec.name} needs.",
            f"It holds {len(tensors)} tensors: {', '.join(sorted(tensors)[:3])}, ...",
        ) from error
    except ValueError as error:
        raise UserError(f"{source} does not fit {spec.name}: {error}") from error
    # Copies: several of them may be views of one tensor, which safetensors refuses.
    return {name: tensor.contiguous().clone() for name, tensor in made.items()}


def _check_settings(spec: Spec, source: Path, config: Any) -> None:
    """Raises UserError where the authors' config.json tells of another model than the spec. Without
    one, or a function that reads it, a warning says what was not checked.
    """
    if not _reads_settings(spec):
        warn(f"{spec.name} exports no settings_from_upstream: only names and shapes were checked.")
        return
    module = load_module(spec)
    path = (source if source.is_dir() else source.parent) / checkpoint.CONFIG
    if not path.is_file():
        unseen = ", ".join(module.NOT_IN_SHAPES)
        warn(f"no {path}, so these settings of the weights were not checked: {unseen}.")
        return
    ours = module.settings_from_upstream(_upstream_config(spec, config))
    try:
        theirs = module.settings_from_upstream(checkpoint.read_object(path))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} does not fit {spec.name}: {error}.") from error
    wrong = {name: value for name, value in theirs.items() if ours.get(name) != value}
    if wrong:
        asked = {name: getattr(config, name) for name in wrong}
        raise UserError(
            f"{path} means {_listed(wrong)}, but {spec.text} means {_listed(asked)}.",
            f"Use the spec {parse(f'{spec.name}:{_listed(spec.overrides | theirs)}').text}",
        )


def _reads_settings(spec: Spec) -> bool:
    return hasattr(load_module(spec), "settings_from_upstream")


def _upstream_config(spec: Spec, config: Any) -> dict[str, Any]:
    try:
        return load_module(spec).upstream_config(config)
    except ValueError as error:
        raise UserError(f"{spec.text} has no counterpart upstream: {error}") from error


def _listed(settings: dict[str, Any]) -> str:
    """As a spec has it: "norm_eps=1e-06, window=512"."""
    return ", ".join(f"{name}={value}" for name, value in settings.items())


def _check(spec: Spec, source: Path, got: Tensors, expected: Tensors, config: object) -> None:
    """Raises UserError for the first tensor, in the model's order, that is missing or misshapen."""
    sizes = f"Give {spec.name} the sizes of these weights: `cat-bench list` shows its settings."
    for name, wanted in expected.items():
        if name not in got:
            raise UserError(
                f"{source} gives no '{name}', which {spec.text} has, with shape "
                f"{tuple(wanted.shape)}.",
                sizes,
            )
        shape, wanted_shape = tuple(got[name].shape), tuple(wanted.shape)
        if shape != wanted_shape:
            words = getattr(config, "vocab_size", None)
            if shape[1:] == wanted_shape[1:] and wanted_shape[0] == words:
                sizes = f"Set vocab_size={shape[0]} in the spec: rows are neither padded nor cut."
            raise UserError(
                f"'{name}' from {source} has shape {shape}, expected {wanted_shape} for "
                f"{spec.text}.",
                sizes,
            )
    unknown = [name for name in got if name not in expected]
    if unknown:
        raise UserError(
            f"{source} gives '{unknown[0]}' with shape {tuple(got[unknown[0]].shape)}, which "
            f"{spec.text} does not have; so with {len(unknown)} of {len(got)} tensors.",
            sizes,
        )


def _check_numbers(source: Path, tensors: Tensors) -> None:
    """Raises UserError for a quantised or integer tensor; a warning names those with nan or inf."""
    for name, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in FLOATS:
            raise UserError(
                f"'{name}' from {source} has dtype {dtype}, expected one of {', '.join(FLOATS)}.",
                "Save the weights unquantised, as floating-point numbers.",
            )
    bad = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad:
        warn(f"{source} has nan or inf in {len(bad)} of {len(tensors)} tensors, first '{bad[0]}'.")
