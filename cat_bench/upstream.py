"""What the authors' own packages, weights and settings have in common, for all that is `upstream`.

How mamba-ssm is imported, for the paths of that name; for `cat-bench convert`, how tensors get
other names, and which of the authors' settings our models compute.
"""

import importlib.util
import sys
from collections.abc import Mapping
from functools import cache
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from torch import Tensor

from cat_bench.errors import UserError
from cat_bench.packages import install_command, other_version


@cache
def import_mamba_ssm(with_conv1d: bool = False, with_transformers: bool = False) -> None:
    """Make `from mamba_ssm.x import y` work without the compiled extension of Mamba-1.

    mamba_ssm/__init__.py imports Mamba-1, which needs `selective_scan_cuda`; all of Mamba-2 is
    Triton. So the package is registered without running that file, and where the extension is not
    built an empty module takes its place: Mamba-1, which nothing here uses, would fail.
    Raises UserError where mamba-ssm, `with_conv1d` a compiled causal-conv1d, or `with_transformers`
    that package, which mamba_ssm.models imports, is missing or of another version.
    """
    spec = _require("mamba_ssm", "mamba_ssm")
    if with_conv1d:
        _require("causal_conv1d", "causal_conv1d_cuda")
    if with_transformers:
        _require("transformers", "transformers")
    if "mamba_ssm" not in sys.modules:
        package = ModuleType("mamba_ssm")
        package.__spec__, package.__path__ = spec, list(spec.submodule_search_locations or ())
        sys.modules["mamba_ssm"] = package
    if importlib.util.find_spec("selective_scan_cuda") is None:
        empty = ModuleType("selective_scan_cuda")
        empty.__spec__ = ModuleSpec("selective_scan_cuda", None)
        sys.modules["selective_scan_cuda"] = empty


@cache
def require_fla() -> None:
    """Raises UserError where flash-linear-attention is missing or of another version: older ones
    take the arguments of ours and compute something else.
    """
    _require("fla", "fla")


def _require(package: str, module: str) -> ModuleSpec:
    spec, other = importlib.util.find_spec(module), other_version(package)
    if spec is None or other:
        reason = other or f"{package}, and there is no module '{module}'"
        raise UserError(
            f"this path needs the package {reason}.",
            f"Install it: {install_command(package)}",
        )
    return spec


# --- for `cat-bench convert` ----------------------------------------------------------------------


def to_their_names(weights: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """The same tensors; `names`: how a name begins with us, and how it then begins with them.

    Raises ValueError for a name that begins with none of these.
    """
    found = {}
    for name, value in weights.items():
        old = next((old for old in names if name.startswith(old)), None)
        if old is None:
            raise ValueError(
                f"no weight of this model is called '{name}'; "
                f"expected a name that begins with one of {', '.join(names)}"
            )
        found[names[old] + name.removeprefix(old)] = value
    return found


def to_our_names(weights: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """The way back. A head tied to the embedding may be missing there; ours becomes a copy.

    Raises ValueError as the way there does, KeyError where embedding and head are both missing.
    """
    found = to_their_names(weights, {theirs: ours for ours, theirs in names.items()})
    if "head.weight" not in found:
        found["head.weight"] = weights[f"{names['embed.']}weight"].clone()
    return found


def read_settings(
    theirs: dict[str, Any],
    settings: dict[str, tuple[str, Any]],
    built_in: dict[str, tuple],
) -> dict[str, Any]:
    """Our settings by the authors' config.json; what it leaves out has their default.

    `settings`: ours -> (theirs, that default; None: there is none). `built_in`: theirs -> the
    values that our model computes, the default first. Raises ValueError for any other value.
    """
    for name, values in built_in.items():
        value = theirs.get(name, values[0])
        if value not in values:
            known = " or ".join(repr(one) for one in values)
            raise ValueError(f"it has {name}={value!r}, but ours has {known} built in")
    found = {ours: theirs.get(name, default) for ours, (name, default) in settings.items()}
    lacking = [settings[ours][0] for ours, value in found.items() if value is None]
    if lacking:
        raise ValueError(f"it has no {lacking[0]}, which ours needs")
    return found
