"""Optional packages: what each serves, its versions, how it is installed. Imports none of them."""

import importlib.util
from collections.abc import Iterable
from typing import NamedTuple

CUDA = "pip install -c constraints/cuda.txt -e '.[cuda]'"


class Package(NamedTuple):
    """An optional package: what it serves, how it is installed, which versions will do."""

    module: str
    distribution: str
    serves: str
    install: str  # to be pasted into a shell as it is
    needs: str = ""  # the versions that the code was written for; others count as not installed
    gpu_only: bool = False  # its kernels run on NVIDIA GPUs and nowhere else
    extension: str = ""  # compiled module, where the package can be there without and is useless
    core: str = ""  # another distribution with a part of the module, of the same versions


# In the order in which they are installed: `.[cuda]` brings what mamba-ssm and causal-conv1d are
# built with.
PACKAGES = (
    Package(
        "triton",
        "triton",
        "decode path cuda_graph, forward path compile on a GPU",
        CUDA,
        ">= 3.4",  # early launch (kernels.py)
        gpu_only=True,
    ),
    Package(
        "fla",
        "flash-linear-attention",
        "fast paths of GatedDeltaNet, upstream kernels of BASED",
        CUDA,
        ">= 0.6.0, < 0.7",  # older ones ignore that the gates are to be made in the kernel
        gpu_only=True,
        core="fla-core",
    ),
    Package(
        "mamba_ssm",
        "mamba-ssm",
        "fast paths of Mamba2",
        "MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE "
        "pip install --no-build-isolation --no-deps mamba-ssm==2.3.2.post1",
        ">= 2.3.2",
        gpu_only=True,
    ),
    Package(
        "causal_conv1d",
        "causal-conv1d",
        "forward path upstream of Mamba2, and its authors' own loop in suite upstream (to install "
        "it takes nvcc)",
        "pip install --no-build-isolation --no-deps causal-conv1d==1.7.0",
        ">= 1.7",
        gpu_only=True,
        extension="causal_conv1d_cuda",
    ),
    Package("lm_eval", "lm-eval", "suite lm_eval", "pip install -e '.[eval]'", ">= 0.4.13, < 0.5"),
    Package(
        "transformers",
        "transformers",
        "suite lm_eval, and the loop of Mamba2's authors in suite upstream",
        "pip install -e '.[eval]'",
        ">= 5.6.2, < 6",
    ),
    Package("datasets", "datasets", "fetching data sets", "pip install -e '.[eval]'"),
)


BY_MODULE = {package.module: package for package in PACKAGES}


def install_command(module: str) -> str:
    """How to install what `import module` needs."""
    return BY_MODULE[module].install if module in BY_MODULE else f"pip install {module}"


def install_commands(modules: Iterable[str]) -> str:
    """How to install all of them, for a shell: each command once, in the order of PACKAGES."""
    order = [*BY_MODULE]
    known = sorted(modules, key=lambda m: order.index(m) if m in BY_MODULE else len(order))
    return "; ".join(dict.fromkeys(map(install_command, known)))


def is_installed(module: str) -> bool:
    """Looks for it in a version that will do, or for its compiled part where only that counts;
    imports nothing.
    """
    extension = BY_MODULE[module].extension if module in BY_MODULE else ""
    top = (extension or module).partition(".")[0]  # a submodule cannot be found without importing
    return importlib.util.find_spec(top) is not None and not other_version(module)


def missing(module: str) -> str:
    """What a message says after "needs the package", of one that `is_installed` denies."""
    return other_version(module) or f"{module}, which is not installed"


def other_version(module: str) -> str:
    """ "flash-linear-attention >= 0.6.0, < 0.7, found 0.4.1"; "" where the version will do, and
    where the package is not there or tells none.
    """
    if module in BY_MODULE and (needs := BY_MODULE[module].needs):
        for distribution in filter(None, (BY_MODULE[module].distribution, BY_MODULE[module].core)):
            version = version_of(distribution)
            if version and not is_within(version, needs):
                return f"{distribution} {needs}, found {version}"
    return ""


def is_within(version: str, needs: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(needs).contains(version, prereleases=True)


def version_of(distribution: str) -> str | None:
    from importlib import metadata  # 25 ms, which `list` does not need

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def is_gpu_only(module: str) -> bool:
    """False for a package that is not known here."""
    return module in BY_MODULE and BY_MODULE[module].gpu_only
