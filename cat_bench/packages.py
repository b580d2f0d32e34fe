"""Optional packages: what each serves and how it is installed. Imports none of them."""

from typing import NamedTuple


class Package(NamedTuple):
    """An optional package: what it serves and how it is installed."""

    module: str
    distribution: str
    serves: str
    install: str


PACKAGES = (
    Package("triton", "triton", "decode path cuda_graph", "pip install -e '.[cuda]'"),
    Package(
        "fla",
        "flash-linear-attention",
        "fast paths of GatedDeltaNet, upstream kernels of BASED",
        "pip install -e '.[cuda]'",
    ),
    Package(
        "mamba_ssm",
        "mamba-ssm",
        "fast paths of Mamba2",
        "MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE "
        "pip install --no-build-isolation --no-deps mamba-ssm==2.3.2.post1",
    ),
    Package(
        "causal_conv1d",
        "causal-conv1d",
        "a faster convolution for upstream Mamba2",
        "pip install --no-build-isolation --no-deps causal-conv1d==1.7.0  (compiles with nvcc)",
    ),
    Package("lm_eval", "lm-eval", "suite lm_eval", "pip install -e '.[eval]'"),
    Package("transformers", "transformers", "suite lm_eval", "pip install -e '.[eval]'"),
    Package("datasets", "datasets", "fetching data sets", "pip install -e '.[eval]'"),
)


def install_command(module: str) -> str:
    """How to install what `import module` needs."""
    return {known.module: known.install for known in PACKAGES}.get(module, f"pip install {module}")
