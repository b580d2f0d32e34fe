"""How the authors' own packages are imported, for the paths called `upstream`."""

import importlib.util
import sys
from functools import cache
from importlib.machinery import ModuleSpec
from types import ModuleType

from cat_bench.errors import UserError
from cat_bench.packages import install_command


@cache
def import_mamba_ssm(with_conv1d: bool = False) -> None:
    """Make `from mamba_ssm.x import y` work without the compiled extension of Mamba-1.

    mamba_ssm/__init__.py imports Mamba-1, which needs `selective_scan_cuda`; all of Mamba-2 is
    Triton. So the package is registered without running that file, and where the extension is not
    built an empty module takes its place: Mamba-1, which nothing here uses, would fail.
    Raises UserError where mamba-ssm, or `with_conv1d` a compiled causal-conv1d, is missing.
    """
    spec = _require("mamba_ssm", "mamba_ssm")
    if with_conv1d:
        _require("causal_conv1d", "causal_conv1d_cuda")
    if "mamba_ssm" not in sys.modules:
        package = ModuleType("mamba_ssm")
        package.__spec__, package.__path__ = spec, list(spec.submodule_search_locations or ())
        sys.modules["mamba_ssm"] = package
    if importlib.util.find_spec("selective_scan_cuda") is None:
        empty = ModuleType("selective_scan_cuda")
        empty.__spec__ = ModuleSpec("selective_scan_cuda", None)
        sys.modules["selective_scan_cuda"] = empty


def _require(package: str, module: str) -> ModuleSpec:
    spec = importlib.util.find_spec(module)
    if spec is None:
        raise UserError(
            f"this path of Mamba2 needs the package {package}, and there is no module '{module}'.",
            f"Install it: {install_command(package)}",
        )
    return spec
