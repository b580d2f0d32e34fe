"""The machine behind a number: provenance, NVML with and without a GPU, resume rules, doctor."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from cat_bench import environment, packages, store

H200 = {
    "gpu_name": "NVIDIA H200",
    "gpu_memory_bytes": 150_754_820_096,
    "driver": "580.95.05",
    "driver_branch": "580",
    "source_hash": "a",
    "torch": "2.11.0+cu130",
    "cuda": "13.0",
    "cpu_name": "Intel Xeon",
    "cpu_cores": 16,
}
LAPTOP = {"gpu_name": None, "cpu_name": "AMD EPYC", "cpu_cores": 2, "torch": "2.13.0+cpu"}


class NVMLError(Exception):
    """Stands for pynvml's own."""


@pytest.fixture
def gpu(monkeypatch):
    """An NVML with one GPU, as pynvml shows it; tests replace single answers."""

    nvml = ModuleType("pynvml")
    answers = {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByIndex": lambda index: f"GPU {index}",
        "nvmlDeviceGetHandleByUUID": lambda uuid: f"GPU {uuid}",
        "nvmlSystemGetDriverVersion": lambda: "580.95.05",
        "nvmlDeviceGetName": lambda device: "NVIDIA H200",
        "nvmlDeviceGetUUID": lambda device: f"UUID of {device}",
        "nvmlDeviceGetIndex": lambda device: int(device.split()[-1]),
        "nvmlDeviceGetMemoryInfo": lambda device: SimpleNamespace(total=150_754_820_096),
        "nvmlDeviceGetEnforcedPowerLimit": lambda device: 700_000,
        "nvmlDeviceGetMaxClockInfo": lambda device, kind: {"sm": 1980, "mem": 3201}[kind],
        "nvmlDeviceGetClockInfo": lambda device, kind: {"sm": 1755, "mem": 3201}[kind],
        "nvmlDeviceGetTemperature": lambda device, sensor: 41,
        "nvmlDeviceGetPowerUsage": lambda device: 352_500,
        "nvmlDeviceGetCurrentClocksEventReasons": lambda device: 0b101001,
        "nvmlDeviceGetTotalEnergyConsumption": lambda device: 12_345,
    }
    constants = {"NVML_CLOCK_SM": "sm", "NVML_CLOCK_MEM": "mem", "NVML_TEMPERATURE_GPU": "gpu"}
    import pynvml

    flags = {name: getattr(pynvml, name) for name in environment.SLOW_DOWN_REASONS.values()}
    for name, value in {**answers, **constants, **flags, "NVMLError": NVMLError}.items():
        setattr(nvml, name, value)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return nvml


def refuse(*_):
    raise NVMLError("Not Supported")


def test_the_very_device_is_captured_but_forbids_no_resume(gpu, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    third = environment.capture(["cat-bench"])
    assert (third["gpu_uuid"], third["gpu_index"]) == ("UUID of GPU 3", 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert environment.conflicts(third, environment.capture(["cat-bench"])) == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert environment.capture(["cat-bench"])["gpu_uuid"] is None


# --- NVML -----------------------------------------------------------------------------------------


def test_gpu_facts_are_in_si_units(gpu):
    captured = environment.capture(["cat-bench"])
    assert captured["gpu_name"] == "NVIDIA H200"
    assert captured["gpu_memory_bytes"] == 150_754_820_096
    assert (captured["driver"], captured["driver_branch"]) == ("580.95.05", "580")
    assert captured["power_limit_w"] == 700
    assert captured["sm_clock_max_hz"] == 1.98e9
    assert captured["memory_clock_max_hz"] == 3.201e9


def test_clock_state_decodes_reasons_and_leaves_idle_out(gpu):
    assert environment.clock_state() == {
        "sm_clock_hz": 1.755e9,
        "memory_clock_hz": 3.201e9,
        "temperature_c": 41,
        "power_w": 352.5,
        "slow_down_reasons": ["hw_slowdown", "sw_thermal_slowdown"],  # bits 8, 32; bit 1 is idle
    }


def test_what_nvml_does_not_tell_is_none(gpu):
    gpu.nvmlDeviceGetEnforcedPowerLimit = refuse
    gpu.nvmlDeviceGetCurrentClocksEventReasons = refuse
    gpu.nvmlDeviceGetMemoryInfo = refuse
    captured = environment.capture(["cat-bench"])
    assert captured["power_limit_w"] is None and captured["gpu_memory_bytes"] is None
    assert captured["gpu_name"] == "NVIDIA H200"
    assert "slow_down_reasons" not in environment.clock_state()


@pytest.mark.parametrize("without", ["driver", "package"])
def test_no_nvml_is_no_error(gpu, monkeypatch, without):
    if without == "driver":
        gpu.nvmlInit = refuse
    else:
        monkeypatch.setitem(sys.modules, "pynvml", None)  # makes the import fail
    assert environment.clock_state() == {}
    assert environment.capture(["cat-bench"])["gpu_name"] is None


@pytest.mark.parametrize(
    ("visible", "device"),
    [("2,3", "GPU 2"), ("GPU-ab12", "GPU GPU-ab12"), ("", None), ("-1", None)],
)
def test_the_first_visible_gpu_is_asked(gpu, monkeypatch, visible, device):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert environment.nvml_device() == device


def test_listing_needs_no_package_metadata():
    code = "import sys, cat_bench.environment; sys.exit('importlib.metadata' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_reason_is_a_flag_of_its_own():
    import pynvml

    flags = [getattr(pynvml, name) for name in environment.SLOW_DOWN_REASONS.values()]
    assert len({flag for flag in flags if flag.bit_count() == 1}) == len(flags)
    assert pynvml.nvmlClocksEventReasonGpuIdle not in flags


# --- provenance -----------------------------------------------------------------------------------


def test_capture_survives_json_and_names_no_path_of_the_machine():
    captured = environment.capture(["/some/where/bin/cat-bench", "run", "two words"])
    assert json.loads(json.dumps(captured)) == captured
    assert captured["command"] == "cat-bench run 'two words'"
    assert str(environment.PROJECT) not in json.dumps(captured)
    assert captured["source_hash"] == environment.source_hash()
    assert environment.digest(captured) == store.digest(captured)


def test_versions_are_those_that_torch_says():
    import torch

    captured = environment.capture(["cat-bench"])
    assert captured["torch"] == torch.__version__
    assert captured["cuda"] == torch.version.cuda


def test_command_of_the_module_is_written_as_typed():
    captured = environment.capture(["/x/cat_bench/__main__.py", "doctor"])
    assert captured["command"] == "python -m cat_bench doctor"


def test_source_hash_follows_contents_and_names_of_own_code(tmp_path: Path):
    for folder in environment.CODE_FOLDERS:
        (tmp_path / folder).mkdir()
    file = tmp_path / "baselines" / "mine.py"
    file.write_text("width = 1\n")
    first = environment.source_hash(tmp_path)
    (tmp_path / "notes.py").write_text("not the package's\n")
    (tmp_path / "baselines" / "notes.txt").write_text("no code\n")
    assert environment.source_hash(tmp_path) == first
    file.write_text("width = 2\n")
    second = environment.source_hash(tmp_path)
    file.rename(tmp_path / "baselines" / "yours.py")
    third = environment.source_hash(tmp_path)
    (tmp_path / "cat_bench" / "kernel.cu").write_text("int width = 1;\n")
    assert len({first, second, third, environment.source_hash(tmp_path)}) == 4


def test_commit_is_not_that_of_a_repository_around_the_installation(monkeypatch):
    answers = {"--show-toplevel": "/somebody/elses/project", "HEAD": "c0ffee"}
    monkeypatch.setattr(environment, "_git", lambda *arguments: answers[arguments[-1]])
    monkeypatch.setattr(environment, "_installed_commit", lambda: None)
    captured = environment.capture(["cat-bench"])
    assert captured["commit"] is None and captured["dirty"] is None


@pytest.mark.parametrize(("status", "dirty"), [("", False), (" M cat_bench/cat.py", True)])
def test_dirty_is_what_git_says_of_the_code(monkeypatch, status, dirty):
    def git(*arguments: str) -> str:
        if arguments[0] == "status":
            assert "cat_bench" in arguments and "results" not in arguments
            return status
        return str(environment.PROJECT) if "--show-toplevel" in arguments else "c0ffee"

    monkeypatch.setattr(environment, "_git", git)
    captured = environment.capture(["cat-bench"])
    assert (captured["commit"], captured["dirty"]) == ("c0ffee", dirty)


def test_machine_line():
    gpu_line = "NVIDIA H200, driver 580.95.05, torch 2.11.0, CUDA 13.0"
    assert environment.machine_line(H200) == gpu_line
    assert environment.machine_line(H200, "cuda") == gpu_line
    assert environment.machine_line(H200, "cpu") == "CPU: Intel Xeon, 16 cores, torch 2.11.0"
    assert environment.machine_line(LAPTOP) == "CPU: AMD EPYC, 2 cores, torch 2.13.0"
    assert environment.machine_line({}) == "CPU: unknown, unknown cores, torch unknown"


# --- resume ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("gpu_name", "NVIDIA H100 80GB HBM3", "GPU was NVIDIA H200, is NVIDIA H100 80GB HBM3"),
        ("gpu_name", None, "GPU was NVIDIA H200, is none"),
        ("gpu_memory_bytes", 1, "GPU memory in bytes was 150754820096, is 1"),
        ("driver_branch", "595", "driver branch was 580, is 595"),
        ("source_hash", "b", "source hash of cat-bench was a, is b"),
    ],
)
def test_what_forbids_a_resume(key, value, reason):
    assert environment.conflicts(H200, {**H200, key: value}) == [reason]


def test_what_does_not_forbid_a_resume():
    later = {**H200, "driver": "580.105.08", "command": "other", "commit": "b", "cpu_name": "other"}
    assert environment.conflicts(H200, later) == []


def test_without_a_gpu_another_cpu_forbids_a_resume():
    assert environment.conflicts(LAPTOP, {**LAPTOP, "cpu_name": "Intel Xeon"}) == [
        "CPU was AMD EPYC, is Intel Xeon"
    ]


# --- doctor ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_doctor_asks_everything_for_real(monkeypatch, tmp_path):
    import torch

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    checks = {check.name: check for check in environment.doctor(tmp_path / "not" / "there")}
    assert torch.__version__ in checks["torch"].detail
    assert checks["architecture cat"].status == checks["architecture dense"].status == "ok"
    assert {package.distribution for package in environment.PACKAGES} <= set(checks)
    assert {"python", "commit", "cuda", "nvml", "disk"} <= set(checks)
    assert all(check.fix for check in checks.values() if check.status != "ok")


def test_doctor_goes_on_after_an_architecture_that_does_not_load(monkeypatch):
    facts = {"version": "2.13.0", "cuda": None, "devices": []}

    def ask(names: list[str]) -> tuple[list, str]:  # dies on the architecture called "broken"
        loaded = names[: names.index("broken")] if "broken" in names else names
        return [facts, *loaded], "ImportError: no such thing"

    infos = [SimpleNamespace(name=name) for name in ("cat", "broken", "dense")]
    monkeypatch.setattr(environment.spec, "architectures", lambda: infos)
    monkeypatch.setattr(environment, "_ask_worker", ask)
    monkeypatch.setattr(environment, "nvml_device", lambda: None)
    found = [(c.name, c.status) for c in environment._check_torch_and_architectures()]
    assert found == [
        ("torch", "ok"),
        ("cuda", "warn"),
        ("architecture cat", "ok"),
        ("architecture broken", "fail"),
        ("architecture dense", "ok"),
    ]


def test_doctor_names_the_fix_of_a_torch_that_does_not_import(monkeypatch):
    monkeypatch.setattr(environment, "_ask_worker", lambda names: ([], "ImportError: libc"))
    (check,) = environment._check_torch_and_architectures()
    assert (check.status, check.detail) == ("fail", "ImportError: libc")
    assert "pip install" in check.fix


def test_doctor_fails_where_torch_cannot_use_the_gpu(gpu):
    facts = {"version": "2.13.0+cpu", "cuda": None, "devices": []}
    assert [check.status for check in environment._check_torch(facts)] == ["ok", "fail"]


def test_doctor_tells_a_busy_cpu(monkeypatch):
    assert environment._check_cpu().status == "ok"
    monkeypatch.setattr(environment, "_cpu_cores", lambda: 1)
    monkeypatch.setattr(environment.os, "getloadavg", lambda: (0.6, 0.0, 0.0))
    check = environment._check_cpu()
    assert check.status == "warn" and "(load 0.6 on 1 core, " in check.detail and check.fix
    monkeypatch.delattr(environment.os, "getloadavg")  # Windows
    assert environment._check_cpu().status == "ok"


def test_doctor_tells_a_missing_energy_counter(gpu):
    assert [check.status for check in environment._check_nvml()] == ["ok", "ok"]
    gpu.nvmlDeviceGetTotalEnergyConsumption = refuse
    assert [check.status for check in environment._check_nvml()] == ["ok", "warn"]


def test_doctor_tells_a_package_of_another_version(monkeypatch):
    triton = environment.Package("json", "triton", "kernels", "pip install it", ">= 3.4")
    monkeypatch.setitem(packages.BY_MODULE, "json", triton)
    monkeypatch.setattr(packages, "version_of", lambda name: "3.3.1")
    check = environment._check_package(triton)
    assert check.detail == "needs triton >= 3.4, found 3.3.1; needed for: kernels"
    assert (check.status, check.fix) == ("warn", "pip install it")


@pytest.mark.parametrize(
    ("triton", "capability", "warned"),
    [("3.6.0", (9, 0), True), ("3.7.1", (9, 0), False), ("3.6.0", (8, 0), False)],
)
def test_doctor_tells_where_gated_gradients_are_refused(
    gpu, monkeypatch, triton, capability, warned
):
    gpu.nvmlDeviceGetCudaComputeCapability = lambda device: capability
    monkeypatch.setattr(environment, "version_of", lambda name: triton)
    assert [check.status for check in environment._check_gated_gradients()] == ["warn"] * warned


def test_doctor_gives_the_install_command_of_a_missing_package():
    missing = environment.Package("no_such_module", "no-such", "nothing", "pip install no-such")
    check = environment._check_package(missing)
    assert (check.status, check.fix) == ("warn", "pip install no-such")
    present = environment._check_package(environment.Package("numpy", "numpy", "all", ""))
    assert present.status == "ok"


PATHS = '''"""An architecture of which only the outline is read."""
REQUIRES = {
    "upstream": "mamba_ssm",
    "upstream_graph": "mamba_ssm",
    "forward upstream": ("mamba_ssm", "no_such_package"),
}

class Config:
    pass

class Model:
    decode_paths = ("eager", "upstream", "upstream_graph")
    forward_paths = ("eager", "upstream", "compile")
'''


@pytest.fixture
def outline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> environment.spec.ArchitectureInfo:
    path = tmp_path / "mine.py"
    path.write_text(PATHS)
    monkeypatch.delitem(sys.modules, "mamba_ssm", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    return environment.spec.describe(str(path))


def test_doctor_says_which_paths_are_ready(outline, tmp_path):
    check = environment._check_paths(outline, has_gpu=True)
    assert (check.name, check.status) == (f"paths of {tmp_path / 'mine.py'}", "warn")
    assert check.detail == (
        "ready: decode eager, forward eager, forward compile; not ready: "
        "decode upstream (needs mamba_ssm), decode upstream_graph (needs mamba_ssm), "
        "forward upstream (needs mamba_ssm and no_such_package)"
    )
    assert check.fix.count("mamba-ssm==") == 1 and check.fix.endswith("pip install no_such_package")

    (tmp_path / "mamba_ssm").mkdir()  # installed without its extension: importing it would fail
    (tmp_path / "mamba_ssm" / "__init__.py").write_text("import selective_scan_cuda")
    assert environment._check_paths(outline, has_gpu=True).detail == (
        "ready: decode eager, decode upstream, decode upstream_graph, forward eager, "
        "forward compile; not ready: forward upstream (needs no_such_package)"
    )


def test_doctor_says_which_paths_need_a_gpu(outline, tmp_path):
    (tmp_path / "mamba_ssm.py").write_text("")
    check = environment._check_paths(outline, has_gpu=False)
    assert check.detail == (
        "ready: decode eager, forward eager, forward compile; not ready: "
        "decode upstream (needs a GPU), decode upstream_graph (needs a GPU), "
        "forward upstream (needs no_such_package and a GPU)"
    )
    assert check.fix == "On a machine with an NVIDIA GPU: pip install no_such_package"
    (tmp_path / "no_such_package.py").write_text("")
    assert environment._check_paths(outline, False).fix == "On a machine with an NVIDIA GPU."
    assert environment._check_paths(outline, True).status == "ok"


def test_doctor_warns_of_a_full_disk(monkeypatch, tmp_path):
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**29))
    assert environment._check_disk(tmp_path).status == "warn"


@pytest.mark.parametrize(("own", "expected"), [(None, "1"), ("0", "0")])
def test_workers_keep_what_triton_tunes(
    own: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_CACHE_AUTOTUNING", raising=False)
    if own is not None:
        monkeypatch.setenv("TRITON_CACHE_AUTOTUNING", own)
    _, variables = environment.worker_process("measure")
    assert variables["TRITON_CACHE_AUTOTUNING"] == expected
