"""A checkpoint is a folder: model.safetensors and config.json (what it means). No pickle.

config.json names the architecture, the layout version and *every* Config field. A field that is
missing is refused, not defaulted: two CATs that differ only in their RoPE rule have the same tensor
names and shapes, and the wrong rule fails silently (cat_spec.md 1.4).
"""

import hashlib
import json
from dataclasses import asdict, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from cat_bench.architecture import DTYPES, Architecture, load_module
from cat_bench.errors import UserError
from cat_bench.spec import Spec, describe, parse

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS, CONFIG = "model.safetensors", "config.json"
CONVERT = "The authors' weights become such a folder by: cat-bench convert SPEC FOLDER -o NEW"


def save(folder: Path, spec: Spec, model: Architecture) -> None:
    """Write weights and config. An interrupted save leaves no config, so `load` refuses it.

    Raises OSError where the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)  # an old config must never explain new weights
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / WEIGHTS)
    meaning = meaning_of(spec, model.config)
    (folder / CONFIG).write_text(json.dumps(meaning, indent=2) + "\n")


def meaning_of(spec: Spec, config: Any) -> dict[str, Any]:
    """What config.json holds."""
    return {
        "architecture": spec.name,
        "layout_version": _layout_version(spec),
        "config": asdict(config),
    }


def write(folder: Path, tensors: "dict[str, Tensor]", meaning: dict[str, Any] | None) -> None:
    """A new folder of tensors, with config.json unless `meaning` is None. It appears when whole.

    Raises UserError where it exists or cannot be written; nothing is then left behind.
    """
    check_is_new(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
            part = Path(scratch) / folder.name
            part.mkdir()
            save_file(tensors, part / WEIGHTS)
            if meaning is not None:
                (part / CONFIG).write_text(json.dumps(meaning, indent=2) + "\n")
            part.rename(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write {folder}: {error}.", "Check permissions and free space there."
        ) from error


def check_is_new(folder: Path) -> None:
    if folder.exists():
        raise UserError(f"{folder} exists already.", "Give a new folder, or remove that one.")


def load(
    folder: Path, decode_path: str = "eager", device: str = "cpu", dtype: str = "float32"
) -> Architecture:
    """The model of a checkpoint folder, in evaluation mode.

    Raises UserError where the folder is no checkpoint, a Config field (the RoPE rule, say) is
    missing or unknown, the layout version is another one, or tensors do not fit.
    """
    spec, config = read_config(folder)
    model = load_module(spec).Model(config, decode_path).to(device=device, dtype=DTYPES[dtype])
    load_into(model, folder, device)
    return model.eval()


def load_into(model: Architecture, folder: Path, device: str) -> None:
    """Give `model` the weights of `folder`, in its own dtype. Raises UserError if they do not fit.

    The config is not looked at: `check_config` does that.
    """
    try:
        tensors = load_file(folder / WEIGHTS, device=device)
        model.load_state_dict(tensors)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"the weights of {folder} cannot be loaded: {error}") from error


def check_config(folder: Path, spec: Spec, config: Any) -> None:
    """Raises UserError unless `folder` holds weights of exactly this architecture and Config."""
    saved_spec, saved = read_config(folder)
    if saved_spec.name != spec.name:
        raise UserError(
            f"{folder} holds weights of {saved_spec.name}, got the spec {spec.text}.",
            f"Use the spec {_spec_of(saved_spec, saved)}",
        )
    wrong = {k: v for k, v in asdict(saved).items() if v != getattr(config, k)}
    if wrong:
        asked = {name: getattr(config, name) for name in wrong}
        raise UserError(
            f"{folder} has {_listed(wrong)}, but {spec.text} means {_listed(asked)}.",
            f"Use the spec {_spec_of(saved_spec, saved)}",
        )


def check_tensors(folder: Path, spec: Spec, model: Architecture) -> None:
    """Raises UserError unless the weights of `folder` are whole and have the names and shapes of
    `model`. Reads their header only.
    """
    path = folder / WEIGHTS
    try:
        with safe_open(path, "pt") as file:
            held = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} cannot be read as safetensors: {error}.", "Copy or convert it again."
        ) from error
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in [*wanted, *held]:
        if held.get(name) != wanted.get(name):
            raise UserError(
                f"{path} has {_shaped(held, name)}, but {spec.text} has {_shaped(wanted, name)}.",
                f"Weights and {CONFIG} must be of one model: copy or convert the folder again.",
            )


def _shaped(shapes: dict[str, tuple[int, ...]], name: str) -> str:
    return f"'{name}' with shape {shapes[name]}" if name in shapes else f"no '{name}'"


def _spec_of(spec: Spec, config: Any) -> str:
    """The whole spec of a saved Config, to be typed."""
    known = describe(spec.name).fields  # of a user's Config: not those that it inherits
    settings = {name: value for name, value in asdict(config).items() if name in known}
    return parse(f"{spec.name}:{_listed(settings, ',')}").text


def _listed(settings: dict[str, Any], comma: str = ", ") -> str:
    return comma.join(f"{name}={value}" for name, value in settings.items())


def digest(folder: Path) -> str:
    """ "sha256:" and the first 12 hex digits over config.json and the weights."""
    total = hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        try:
            with (folder / name).open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise UserError(
                f"{folder / name} cannot be read: {error.strerror}.",
                f"A checkpoint folder holds {WEIGHTS} and {CONFIG}. {CONVERT}",
            ) from error
    return f"sha256:{total.hexdigest()[:12]}"


def read_config(folder: Path) -> tuple[Spec, Any]:
    """The architecture and the Config of a checkpoint folder, every field as it was saved."""
    meaning = _read_config(folder)
    spec = parse(str(meaning["architecture"]))
    config = _strict_config(folder, load_module(spec).Config, meaning["config"])
    if meaning["layout_version"] != _layout_version(spec):
        raise UserError(
            f"{folder} has layout version {meaning['layout_version']}; "
            f"{spec.name} reads version {_layout_version(spec)}."
        )
    return spec, config


def _read_config(folder: Path) -> dict:
    path = folder / CONFIG
    meaning = read_object(
        path, "Tensors alone do not tell every setting: give a folder that cat-bench wrote."
    )
    missing = {"architecture", "layout_version", "config"} - set(meaning)
    if missing:
        raise UserError(f"{path} lacks {', '.join(sorted(missing))}.", CONVERT)
    return meaning


def read_object(path: Path, hint: str = "") -> dict[str, Any]:
    """What a JSON file holds. Raises UserError, with `hint`, where that is no object."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:  # ValueError: neither JSON nor UTF-8
        raise UserError(f"{path} cannot be read: {error}.", hint) from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds {type(found).__name__}, expected an object.", hint)
    return found


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
            "A default is no substitute: a wrong setting gives wrong logits silently.",
        )
    try:
        return config_class(**values)
    except (ValueError, TypeError) as error:
        raise UserError(f"the config of {folder} does not fit: {error}") from error


def _layout_version(spec: Spec) -> int:
    return getattr(load_module(spec), "LAYOUT_VERSION", 1)
