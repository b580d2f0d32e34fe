"""The machine and the code behind a number: what environment.json holds, and the checks of doctor.

Nothing here imports torch: asking is quick and leaves no CUDA context on the GPU that is about to
be measured. GPU facts come from NVML, versions from package metadata; what only torch knows is
asked in a process of its own. Whatever cannot be read is None, never an error.

Units: bytes, hertz, watts, degrees Celsius.
Try it: cat-bench doctor
"""

import importlib.util
import json
import os
import platform
import runpy
import shlex
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

from cat_bench import spec, store
from cat_bench.packages import (
    CUDA,
    PACKAGES,
    Package,
    install_commands,
    is_installed,
    is_within,
    other_version,
    version_of,
)
from cat_bench.store import digest as digest  # one definition of Record.environment
from cat_bench.user_code import hash_of

PROJECT = Path(__file__).resolve().parents[1]
COMMIT_VARIABLE = "CAT_BENCH_COMMIT"  # for a copy of the tree without its .git
CODE_FOLDERS = ("cat_bench", "baselines", "recall_tasks")

# What NVML's clocks event bits mean. Its "GPU idle" is left out: that slows no measurement down.
SLOW_DOWN_REASONS = {
    "applications_clocks_setting": "nvmlClocksEventReasonApplicationsClocksSetting",
    "sw_power_cap": "nvmlClocksEventReasonSwPowerCap",
    "hw_slowdown": "nvmlClocksEventReasonHwSlowdown",
    "sync_boost": "nvmlClocksEventReasonSyncBoost",
    "sw_thermal_slowdown": "nvmlClocksEventReasonSwThermalSlowdown",
    "hw_thermal_slowdown": "nvmlClocksEventReasonHwThermalSlowdown",
    "hw_power_brake_slowdown": "nvmlClocksEventReasonHwPowerBrakeSlowdown",
    "display_clock_setting": "nvmlClocksEventReasonDisplayClockSetting",
}
VERSIONS_OF = ("cat-bench", "numpy", "einops", *(package.distribution for package in PACKAGES))


class Check(NamedTuple):
    """One line of `cat-bench doctor`."""

    name: str
    status: Literal["ok", "warn", "fail"]
    detail: str
    fix: str = ""


# --- provenance ----------------------------------------------------------------------------------


def capture(command: list[str]) -> dict[str, Any]:
    """Everything that environment.json holds. `command` is sys.argv."""
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        "command": _command_line(command),
        **_code(),
        **_host(),
        **_versions(),
        **_gpu(),
    }


def machine_line(environment: dict[str, Any], device: str | None = None) -> str:
    """The line over every table: the GPU if there is one, unless the rows ran on device "cpu"."""
    known = environment.get
    torch = f"torch {(known('torch') or 'unknown').split('+')[0]}"
    if known("gpu_name") and device != "cpu":
        cuda = f"CUDA {known('cuda') or 'unknown'}"
        return f"{known('gpu_name')}, driver {known('driver') or 'unknown'}, {torch}, {cuda}"
    cores = known("cpu_cores")
    plural = "core" if cores == 1 else "cores"
    return f"CPU: {known('cpu_name') or 'unknown'}, {cores or 'unknown'} {plural}, {torch}"


def conflicts(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Why rows measured under `new` must not join a run made under `old`. Empty: they may."""
    differ = {
        "gpu_name": "GPU",
        "gpu_memory_bytes": "GPU memory in bytes",
        "driver_branch": "driver branch",
        "source_hash": "source hash of cat-bench",
    }
    if not (old.get("gpu_name") or new.get("gpu_name")):
        differ["cpu_name"] = "CPU"
    return [
        f"{what} was {old.get(key) or 'none'}, is {new.get(key) or 'none'}"
        for key, what in differ.items()
        if old.get(key) != new.get(key)
    ]


def source_hash(root: Path = PROJECT) -> str:
    """SHA-256 over the names and contents of the package's own code, Python and CUDA, sorted."""
    code = (
        path
        for folder in CODE_FOLDERS
        for ending in ("*.py", "*.cu")
        for path in (root / folder).rglob(ending)
    )
    return hash_of(root, code)


def _command_line(command: list[str]) -> str:
    """As one would type it: where the program lies on this machine is left out."""
    program = Path(command[0]).name if command else ""
    program = "python -m cat_bench" if program == "__main__.py" else program
    return " ".join([program, shlex.join(command[1:])]).strip()


def _code() -> dict[str, Any]:
    commit, dirty = _installed_commit() or os.environ.get(COMMIT_VARIABLE), None
    top, head = _git("rev-parse", "--show-toplevel"), _git("rev-parse", "HEAD")
    if head and top and Path(top).resolve() == PROJECT:  # not a checkout around our venv
        commit = head
        # Only what can change a number: a run folder just written makes no checkout dirty.
        dirty = bool(_git("status", "--porcelain", "--", *CODE_FOLDERS, "pyproject.toml"))
    return {"commit": commit, "dirty": dirty, "source_hash": source_hash()}


def _git(*arguments: str) -> str | None:
    """What git prints about the project's folder; None where git or the answer is missing."""
    command = ["git", "-C", str(PROJECT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _installed_commit() -> str | None:
    """The commit of a `pip install git+...`, which pip writes down beside the package."""
    from importlib import metadata  # 25 ms, which `list` does not need

    try:
        text = metadata.distribution("cat-bench").read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return None
    return json.loads(text or "{}").get("vcs_info", {}).get("commit_id")


def _host() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_name": _cpu_name(),
        "cpu_cores": _cpu_cores(),
        "host_memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def cpu_in_use() -> str | None:
    """A warning where something else takes the CPU; None where nothing does, or nobody tells."""
    cores = _cpu_cores()
    if cores is None or not hasattr(os, "getloadavg"):  # Windows
        return None
    load = os.getloadavg()[0]  # processes that ran or waited, a mean of about the last minute
    if load <= cores / 2:
        return None
    return (
        f"another process is using the CPU (load {load:.1f} on {cores} "
        f"{'core' if cores == 1 else 'cores'}, over the last minute): timings on the CPU become "
        "many times longer and do not repeat"
    )


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _cpu_cores() -> int | None:
    """Those this process may use, which containers and batch systems make fewer."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _versions() -> dict[str, Any]:
    build = _torch_build()
    return {
        "torch": build.get("__version__") or version_of("torch"),
        "cuda": build.get("cuda"),  # that torch was built for
        "triton": version_of("triton"),
        "packages": {name: version for name in VERSIONS_OF if (version := version_of(name))},
    }


def _torch_build() -> dict[str, Any]:
    """The constants of torch/version.py, read without importing torch (1.4 s)."""
    found = importlib.util.find_spec("torch")
    path = Path(found.origin).with_name("version.py") if found and found.origin else None
    return runpy.run_path(str(path)) if path and path.is_file() else {}


# --- the GPU, through NVML -----------------------------------------------------------------------


def nvml_device() -> Any | None:
    """NVML's handle of the first GPU that CUDA sees; None without a GPU, NVML or pynvml."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    if visible in ("", "-1"):
        return None
    try:
        import pynvml

        pynvml.nvmlInit()  # counted by NVML, so it may be called again
        # CUDA's numbers are NVML's where all GPUs of a host are of one model.
        if visible.isdecimal():
            return pynvml.nvmlDeviceGetHandleByIndex(int(visible))
        return pynvml.nvmlDeviceGetHandleByUUID(visible)
    except ImportError:
        return None
    except pynvml.NVMLError:
        return None


def processor_name(device: str) -> str:
    """The `gpu_name` or `cpu_name` of `capture`, for "cuda" and "cpu"; a name that nobody tells is
    the one that the store writes for it.
    """
    return (_gpu()["gpu_name"] if device == "cuda" else _cpu_name()) or store.UNKNOWN_DEVICE


def clock_state() -> dict[str, Any]:
    """SM and memory clock, temperature, power and slow-down reasons now; {} without NVML."""
    device = nvml_device()
    if device is None:
        return {}
    import pynvml

    state = {
        "sm_clock_hz": _scaled(1e6, "nvmlDeviceGetClockInfo", device, pynvml.NVML_CLOCK_SM),
        "memory_clock_hz": _scaled(1e6, "nvmlDeviceGetClockInfo", device, pynvml.NVML_CLOCK_MEM),
        "temperature_c": _scaled(
            1.0, "nvmlDeviceGetTemperature", device, pynvml.NVML_TEMPERATURE_GPU
        ),
        "power_w": _scaled(1e-3, "nvmlDeviceGetPowerUsage", device),
        "slow_down_reasons": _slow_down_reasons(device),
    }
    return {name: value for name, value in state.items() if value is not None}


def _gpu() -> dict[str, Any]:
    device = nvml_device()
    keys = ("gpu_name", "gpu_uuid", "gpu_index", "gpu_memory_bytes")
    keys += ("driver", "driver_branch", "power_limit_w")
    clocks = ("sm_clock_max_hz", "memory_clock_max_hz", "clock_state")
    if device is None:
        return dict.fromkeys((*keys, *clocks))
    import pynvml

    driver = _query("nvmlSystemGetDriverVersion")
    memory = _query("nvmlDeviceGetMemoryInfo", device)
    return {
        "gpu_name": _query("nvmlDeviceGetName", device),
        "gpu_uuid": _query("nvmlDeviceGetUUID", device),  # which of several alike
        "gpu_index": _query("nvmlDeviceGetIndex", device),
        "gpu_memory_bytes": memory and memory.total,
        "driver": driver,
        "driver_branch": driver and driver.split(".")[0],
        "power_limit_w": _scaled(1e-3, "nvmlDeviceGetEnforcedPowerLimit", device),
        "sm_clock_max_hz": _scaled(1e6, "nvmlDeviceGetMaxClockInfo", device, pynvml.NVML_CLOCK_SM),
        "memory_clock_max_hz": _scaled(
            1e6, "nvmlDeviceGetMaxClockInfo", device, pynvml.NVML_CLOCK_MEM
        ),
        "clock_state": clock_state(),
    }


def _query(function: str, *arguments: Any) -> Any | None:
    """What an NVML function returns; None where this GPU, driver or partition does not tell."""
    import pynvml

    try:
        return getattr(pynvml, function)(*arguments)
    except pynvml.NVMLError:
        return None


def _scaled(unit: float, function: str, *arguments: Any) -> float | None:
    value = _query(function, *arguments)
    return None if value is None else value * unit


def _slow_down_reasons(device: Any) -> list[str] | None:
    import pynvml

    bits = _query("nvmlDeviceGetCurrentClocksEventReasons", device)
    if bits is None:
        return None
    return [name for name, flag in SLOW_DOWN_REASONS.items() if bits & getattr(pynvml, flag)]


# --- fresh processes -----------------------------------------------------------------------------


def worker_process(*arguments: str) -> tuple[list[str], dict[str, str]]:
    """Command and environment variables of a fresh process that imports what this one imports.

    Its search path is this process's, in the same order, and not the current folder (-P). A crash
    in native code leaves a traceback on stderr (faulthandler). What Triton tunes is kept on disk,
    else every case on upstream's kernels would tune them anew.
    """
    command = [sys.executable, "-P", "-X", "faulthandler", "-m", "cat_bench.worker", *arguments]
    search_path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
    kept = {"TRITON_CACHE_AUTOTUNING": "1"}  # the user's own setting comes after it
    return command, {**kept, **os.environ, "PYTHONPATH": search_path}


# --- doctor --------------------------------------------------------------------------------------


def doctor(results: Path = Path("results")) -> list[Check]:
    """One line per thing that a measurement here relies on."""
    cpu = _check_cpu()  # before the checks below take it themselves
    from_torch = _check_torch_and_architectures()
    has_gpu = any((check.name, check.status) == ("cuda", "ok") for check in from_torch)
    return [
        _check_python(),
        _check_commit(),
        *from_torch,
        *(_check_package(package) for package in PACKAGES),
        *_check_gated_gradients(),
        *(_check_paths(info, has_gpu) for info in spec.architectures()),
        *_check_nvml(),
        _check_disk(results),
        cpu,
    ]


def _check_python() -> Check:
    """Older ones than 3.11 do not come this far."""
    return Check("python", "ok", f"{platform.python_version()}, {sys.platform}")


def _check_commit() -> Check:
    code = _code()
    if code["commit"] is None:
        return Check(
            "commit",
            "warn",
            f"not under git; rows carry source hash {code['source_hash'][:12]} only",
            "Clone the repository, or install it with pip from git.",
        )
    commit = code["commit"][:12]
    if code["dirty"]:
        fix = "Commit before measuring numbers that others should be able to repeat."
        return Check("commit", "warn", f"{commit}, with uncommitted changes of the code", fix)
    return Check("commit", "ok", commit)


def _check_package(package: Package) -> Check:
    if not is_installed(package.module):
        other = other_version(package.module)
        why = f"needs {other}" if other else "not installed"
        detail = f"{why}; needed for: {package.serves}"
        return Check(package.distribution, "warn", detail, package.install)
    version = version_of(package.distribution) or "unknown version"
    return Check(package.distribution, "ok", version)


def _check_gated_gradients() -> list[Check]:
    """Where Triton compiles them wrongly, fla raises by itself (its issue 640)."""
    device, triton = nvml_device(), version_of("triton")
    if device is None or triton is None or not is_within(triton, ">= 3.4, < 3.7.1"):
        return []
    if (_query("nvmlDeviceGetCudaComputeCapability", device) or (0,))[0] != 9:
        return []
    detail = f"fla refuses them on Hopper GPUs with Triton {triton}: no training on its kernels"
    return [Check("gated gradients", "warn", detail, CUDA)]


def _check_paths(info: spec.ArchitectureInfo, has_gpu: bool) -> Check:
    """Which ways to run an architecture are ready here. Packages are found, not imported: mamba_ssm
    counts as installed without its CUDA extension, which only Mamba-1 needs.
    """
    paths = [("decode", path) for path in info.decode_paths]
    paths += [("forward", path) for path in info.forward_paths]
    packages = {path: info.lacking(*path) for path in paths}
    wants = {
        f"{kind} {path}": [
            *(other_version(name) or name for name in lacking),
            *(["a GPU"] if info.needs_gpu(kind, path) > has_gpu else []),
        ]
        for (kind, path), lacking in packages.items()
    }
    ready = [path for path, wanted in wants.items() if not wanted]
    not_ready = [f"{path} (needs {' and '.join(w)})" for path, w in wants.items() if w]
    name, detail = f"paths of {info.name}", f"ready: {', '.join(ready)}"
    if not not_ready:
        return Check(name, "ok", detail)
    fix = install_commands(one for some in packages.values() for one in some)
    if any("a GPU" in wanted for wanted in wants.values()):
        fix = f"On a machine with an NVIDIA GPU{': ' if fix else '.'}{fix}"
    return Check(name, "warn", f"{detail}; not ready: {', '.join(not_ready)}", fix)


def _check_nvml() -> list[Check]:
    device = nvml_device()
    if device is None:
        detail = "no GPU seen: no clocks, temperature, power or energy in the rows"
        return [
            Check("nvml", "warn", detail, "Needed on NVIDIA GPUs only: pip install nvidia-ml-py")
        ]
    gpu = _gpu()
    nvml = Check("nvml", "ok", f"{gpu['gpu_name']}, driver {gpu['driver']}")
    if _query("nvmlDeviceGetTotalEnergyConsumption", device) is None:
        detail = "this GPU tells no total energy: energy_j stays empty"
        return [
            nvml,
            Check("energy counter", "warn", detail, "Needs a Volta or newer, without MIG."),
        ]
    return [nvml, Check("energy counter", "ok", "readable")]


def _check_cpu() -> Check:
    used = cpu_in_use()
    if used:
        return Check("cpu", "warn", used, "Wait until it is idle, or stop the other process.")
    return Check("cpu", "ok", "not busy")


def _check_disk(results: Path) -> Check:
    existing = next(
        path for path in [results.absolute(), *results.absolute().parents] if path.exists()
    )
    free_gib = shutil.disk_usage(existing).free / 2**30
    if not os.access(existing, os.W_OK):
        return Check(
            "disk", "fail", f"{existing} is not writable", "Choose another results folder."
        )
    detail = f"{free_gib:.1f} GiB free for {results}"
    if free_gib < 1:  # rows need megabytes, checkpoints and compile caches gigabytes
        return Check("disk", "warn", detail, "Free some space, or choose another results folder.")
    return Check("disk", "ok", detail)


def _check_torch_and_architectures() -> list[Check]:
    """Asked in fresh processes: one, and one more after each architecture that breaks it."""
    names = [info.name for info in spec.architectures()]
    checks, facts = [], None
    while facts is None or names:
        answers, error = _ask_worker(names)
        if not answers:
            fix = f"pip install -c constraints/cpu.txt -e . (NVIDIA GPU: {CUDA})"
            return [Check("torch", "fail", error, fix)]
        facts, loaded = answers[0], answers[1:]
        checks += [Check(f"architecture {name}", "ok", "loads") for name in loaded]
        names = names[len(loaded) :]
        if names:  # the process died on the next one
            fix = "Repair the file; the error's last line is shown."
            checks.append(Check(f"architecture {names.pop(0)}", "fail", error, fix))
    return [*_check_torch(facts), *checks]


def _ask_worker(names: list[str]) -> tuple[list[Any], str]:
    """What `worker check` answered before it ended, and the last line of its stderr."""
    command, variables = worker_process("check", *names)
    try:
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        return [], "no answer within 300 s"
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    return answers, (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def _check_torch(facts: dict[str, Any]) -> list[Check]:
    build = f"built for CUDA {facts['cuda']}" if facts["cuda"] else "CPU build"
    torch = Check("torch", "ok", f"{facts['version']}, {build}")
    if facts["devices"]:
        return [torch, Check("cuda", "ok", ", ".join(facts["devices"]))]
    if nvml_device() is not None:
        fix = "Install a torch build for this driver's CUDA: see pytorch.org."
        return [torch, Check("cuda", "fail", "there is a GPU, but torch cannot use it", fix)]
    fix = "The paper's sizes need an NVIDIA GPU; --quick and --scale smoke run on the CPU."
    return [torch, Check("cuda", "warn", "no GPU: CPU only", fix)]
