"""Optional packages: what each serves and how it is installed. Imports none of them."""

import importlib.util
from collections.abc import Iterable
from typing import NamedTuple


class Package(NamedTuple):
    """An optional package: what it serves and how it is installed."""

    module: str
    distribution: str
    serves: str
    install: str  # to be pasted into a shell as it is
    gpu_only: bool = False  # its kernels run on NVIDIA GPUs and nowhere else
    extension: str = ""  # compiled module, where the package can be there without and is useless


# In the order in which they are installed: `.[cuda]` brings what mamba-ssm and causal-conv1d are
# built with.
PACKAGES = (
    Package(
        "triton",
        "triton",
        "decode path cuda_graph, forward path compile on a GPU",
        "pip install -e '.[cuda]'",
        gpu_only=True,
    ),
    Package(
        "fla",
        "flash-linear-attention",
        "fast paths of GatedDeltaNet, upstream kernels of BASED",
        "pip install -e '.[cuda]'",
        gpu_only=True,
    ),
    Package(
        "mamba_ssm",
        "mamba-ssm",
        "fast paths of Mamba2",
        "MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE "
        "pip install --no-build-isolation --no-deps mamba-ssm==2.3.2.post1",
        gpu_only=True,
    ),
    Package(
        "causal_conv1d",
        "causal-conv1d",
        "forward path upstream of Mamba2, and its authors' own loop in suite upstream (to install "
        "it takes nvcc)",
        "pip install --no-build-isolation --no-deps causal-conv1d==1.7.0",
        gpu_only=True,
        extension="causal_conv1d_cuda",
    ),
    Package("lm_eval", "lm-eval", "suite lm_eval", "pip install -e '.[eval]'"),
    Package(
        "transformers",
        "transformers",
        "suite lm_eval, and the loop of Mamba2's authors in suite upstream",
        "pip install -e '.[eval]'",
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
    """Looks for it, or for its compiled part where only that counts; imports nothing."""
    extension = BY_MODULE[module].extension if module in BY_MODULE else ""
    top = (extension or module).partition(".")[0]  # a submodule cannot be found without importing
    return importlib.util.find_spec(top) is not None


def is_gpu_only(module: str) -> bool:
    """False for a package that is not known here."""
    return module in BY_MODULE and BY_MODULE[module].gpu_only
