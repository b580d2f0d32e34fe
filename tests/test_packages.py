"""Optional packages: found without importing them, and how to install what is not there."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from cat_bench import packages


def test_an_unknown_package_is_looked_for_by_its_own_name():
    assert packages.is_installed("json") and not packages.is_installed("no_such_package")
    assert packages.install_command("no_such_package") == "pip install no_such_package"
    assert not packages.is_gpu_only("no_such_package")


def test_causal_conv1d_without_its_compiled_part_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A pure-Python build of it installs and fails at import."""
    for module in ("causal_conv1d", "causal_conv1d_cuda"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    (tmp_path / "causal_conv1d.py").write_text("import causal_conv1d_cuda")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert not packages.is_installed("causal_conv1d")
    (tmp_path / "causal_conv1d_cuda.py").write_text("1 / 0  # found, never imported")
    assert packages.is_installed("causal_conv1d")


def test_what_has_kernels_for_gpus_only():
    found = {
        package.module for package in packages.PACKAGES if packages.is_gpu_only(package.module)
    }
    assert found == {"triton", "fla", "mamba_ssm", "causal_conv1d"}


def test_install_commands_are_for_a_shell_and_in_the_order_in_which_they_work():
    """`.[cuda]` brings setuptools and wheel, which mamba-ssm is built with."""
    commands = packages.install_commands(
        ["no_such_package", "causal_conv1d", "mamba_ssm", "fla", "triton"]
    )
    first, second, third, last = commands.split("; ")
    assert first == "pip install -e '.[cuda]'" and last == "pip install no_such_package"
    assert "mamba-ssm==" in second and "causal-conv1d==" in third
    words = [shlex.split(command)[-1] for command in (second, third)]  # nothing after the version
    assert [word.partition("==")[0] for word in words] == ["mamba-ssm", "causal-conv1d"]
    assert subprocess.run(["bash", "-n", "-c", commands], check=False).returncode == 0
