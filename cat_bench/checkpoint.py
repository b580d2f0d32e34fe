"""A checkpoint is a folder: model.safetensors and config.json (what it means). No pickle.

config.json names the architecture, the layout version and *every* Config field. A field that is
missing is refused, not defaulted: two CATs that differ only in their RoPE rule have the same tensor
names and shapes, and the wrong rule fails silently (cat_spec.md 1.4).
"""

import json
from dataclasses import asdict, fields
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cat_bench.architecture import DTYPES, Architecture, load_module
from cat_bench.errors import UserError
from cat_bench.spec import Spec, parse

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def save(folder: Path, spec: Spec, model: Architecture) -> None:
    """Write weights and config. An interrupted save leaves no config, so `load` refuses it.

    Raises OSError where the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)  # an old config must never explain new weights
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / WEIGHTS)
    meaning = {
        "architecture": spec.name,
        "layout_version": _layout_version(spec),
        "config": asdict(model.config),
    }
    (folder / CONFIG).write_text(json.dumps(meaning, indent=2) + "\n")


def load(
    folder: Path, decode_path: str = "eager", device: str = "cpu", dtype: str = "float32"
) -> Architecture:
    """The model of a checkpoint folder, in evaluation mode.

    Raises UserError where the folder is no checkpoint, a Config field (the RoPE rule, say) is
    missing or unknown, the layout version is another one, or tensors do not fit.
    """
    meaning = _read_config(folder)
    spec = parse(str(meaning["architecture"]))
    module = load_module(spec)
    config = _strict_config(folder, module.Config, meaning["config"])
    if meaning["layout_version"] != _layout_version(spec):
        raise UserError(
            f"{folder} has layout version {meaning['layout_version']}; "
            f"{spec.name} reads version {_layout_version(spec)}."
        )
    model = module.Model(config, decode_path).to(device=device, dtype=DTYPES[dtype])
    try:
        tensors = load_file(folder / WEIGHTS, device=device)
        model.load_state_dict(tensors)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"the weights of {folder} cannot be loaded: {error}") from error
    return model.eval()


def _read_config(folder: Path) -> dict:
    path = folder / CONFIG
    try:
        meaning = json.loads(path.read_text())
    except (OSError, ValueError) as error:  # ValueError: neither JSON nor UTF-8
        raise UserError(
            f"{path} cannot be read ({error}); a checkpoint holds {WEIGHTS} and {CONFIG}.",
            "A bare tensor file does not say its RoPE rule: write a config.json beside it.",
        ) from error
    if not isinstance(meaning, dict):
        raise UserError(f"{path} holds {type(meaning).__name__}, expected an object.")
    missing = {"architecture", "layout_version", "config"} - set(meaning)
    if missing:
        raise UserError(f"{path} lacks {', '.join(sorted(missing))}.")
    return meaning


def _strict_config(folder: Path, config_class: type, values: dict):
    if not isinstance(values, dict):
        raise UserError(f"the config of {folder} is {type(values).__name__}, expected an object.")
    known = {field.name for field in fields(config_class)}
    missing, unknown = known - set(values), set(values) - known
    if missing or unknown:
        parts = [f"lacks {sorted(missing)}"] if missing else []
        parts += [f"has unknown {sorted(unknown)}"] if unknown else []
        raise UserError(
            f"the config of {folder} {' and '.join(parts)}; every field must be there.",
            "A default is no substitute: the wrong RoPE rule, say, gives wrong logits silently.",
        )
    try:
        return config_class(**values)
    except (ValueError, TypeError) as error:
        raise UserError(f"the config of {folder} does not fit: {error}") from error


def _layout_version(spec: Spec) -> int:
    return getattr(load_module(spec), "LAYOUT_VERSION", 1)
