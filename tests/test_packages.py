"""Optional packages: found without importing them, and how to install what is not there."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from cat_bench import packages, upstream
from cat_bench.errors import UserError


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


def install(folder: Path, **versions: str) -> None:
    """The metadata of installed distributions, and a module fla."""
    (folder / "fla.py").write_text("1 / 0  # found, never imported")
    for name, version in versions.items():
        info = folder / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.mark.parametrize(
    ("versions", "other"),
    [
        ({}, ""),  # a checkout on the path tells no version
        ({"flash_linear_attention": "0.6.0", "fla_core": "0.6.1"}, ""),
        ({"flash_linear_attention": "0.4.1"}, "flash-linear-attention"),
        ({"flash_linear_attention": "0.6.0", "fla_core": "0.4.1"}, "fla-core"),
    ],
)
def test_a_package_of_another_version_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], other: str
):
    """fla 0.4.1 takes our arguments and computes something else."""
    install(tmp_path, **versions)
    monkeypatch.delitem(sys.modules, "fla", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    expected = f"{other} >= 0.6.0, < 0.7, found 0.4.1" if other else ""
    assert packages.other_version("fla") == expected
    assert packages.is_installed("fla") == (not other)
    assert packages.missing("fla") == (expected or "fla, which is not installed")
    upstream.require_fla.cache_clear()
    if not other:
        return upstream.require_fla()
    with pytest.raises(UserError, match=f"needs the package {expected}") as error:
        upstream.require_fla()
    assert packages.CUDA in error.value.hint


def test_versions_that_we_install_will_do():
    assert packages.is_within("2.3.2.post1", packages.BY_MODULE["mamba_ssm"].needs)
    assert packages.is_within("3.7.1+git1", packages.BY_MODULE["triton"].needs)
    assert not packages.is_within("3.3.1", packages.BY_MODULE["triton"].needs)
    for package in packages.PACKAGES:
        if "==" in package.install:
            assert packages.is_within(package.install.split("==")[1], package.needs)


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
    assert first == packages.CUDA and last == "pip install no_such_package"
    assert "mamba-ssm==" in second and "causal-conv1d==" in third
    words = [shlex.split(command)[-1] for command in (second, third)]  # nothing after the version
    assert [word.partition("==")[0] for word in words] == ["mamba-ssm", "causal-conv1d"]
    assert subprocess.run(["bash", "-n", "-c", commands], check=False).returncode == 0
