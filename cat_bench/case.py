"""What is planned (Case), what is measured (Record), what the user asked for (Options).

Plain frozen dataclasses without torch: plans and reports work on any laptop. Units stand in names.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import Literal

Status = Literal["ok", "oom", "unsupported", "failed"]
WHOLE_NUMBERS = ("batch_size", "prompt_len", "seq_len", "seed")  # of Case; the others are texts
DEFAULT_TIMEOUT_S = 3600.0  # that one case may take


@dataclass(frozen=True)
class Case:
    """One thing to measure, in one fresh process. Equal cases have equal keys, in every run."""

    suite: str  # "efficiency", "training"
    arch: str  # canonical spec text: file name, then overrides unlike the defaults, sorted
    batch_size: int
    prompt_len: int  # tokens; 0 in suites without a prompt
    seq_len: int  # tokens: prompt_len + new tokens
    dtype: str  # "float32", "bfloat16", "float64"
    device: str  # "cpu", "cuda"
    seed: int = 0
    decode_path: str = "eager"
    forward_path: str = "eager"
    scale: str = "custom"  # "smoke", "h100", "paper", "custom": scales never share a table
    weights: str = "random"  # or what a checkpoint folder holds: "sha256:" and 12 hex digits
    protocol: str | None = None
    settings: tuple[tuple[str, str], ...] = ()  # sorted; the suite's own

    @cached_property
    def key(self) -> str:
        """The first 12 hex digits of the SHA-256 of the canonical JSON of all fields."""
        text = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def new_tokens(self) -> int:
        return self.seq_len - self.prompt_len

    def with_repeats(self, repeats: int | None) -> "Case":
        """The same measurement so often; None: by the rule of profiler.py."""
        others = tuple(pair for pair in self.settings if pair[0] != "repeats")
        asked = () if repeats is None else (("repeats", str(repeats)),)
        return replace(self, settings=tuple(sorted(others + asked)))

    @classmethod
    def from_dict(cls, values: dict) -> "Case":
        """The inverse of `dataclasses.asdict`, also after a trip through JSON.

        Raises KeyError, TypeError or ValueError for what is no case.
        """
        for name in (one.name for one in fields(cls) if one.name in values):
            kind, words = (int, "a whole number") if name in WHOLE_NUMBERS else (str, "a text")
            empty = name == "protocol" and values[name] is None
            if name != "settings" and not empty and type(values[name]) is not kind:
                raise ValueError(f"{name} is {values[name]!r}, expected {words}")
        settings = tuple((str(k), str(v)) for k, v in values["settings"])
        return cls(**{**values, "settings": settings})


@dataclass(frozen=True)
class Record:
    """One measured metric of one case. SI units; raw samples kept, statistics belong to reports."""

    case: str  # Case.key
    metric: str  # "latency_s"; the row "case" closes a case
    value: float | None  # the median of the samples where there are several
    unit: str  # "s", "bytes", "tokens/s", "1"
    samples: list[float] = field(default_factory=list)
    status: Status = "ok"
    error: str | None = None
    environment: str = ""  # hash of environment.json; the store fills it in
    at: str = ""  # UTC, ISO 8601; the store fills it in


@dataclass(frozen=True)
class Options:
    """The flags of `cat-bench run`. None means: the suite's default."""

    batch_sizes: tuple[int, ...] | None = None
    seq_lens: tuple[int, ...] | None = None
    prompt_lens: tuple[int, ...] | None = None  # tokens
    new_tokens: int | None = None  # instead of seq_lens: seq_len = prompt_len + new_tokens
    dtype: str | None = None  # default bfloat16 on cuda, float32 on cpu
    device: str = "cpu"
    seeds: tuple[int, ...] = (0,)
    decode_path: str | None = None  # default: each architecture's fastest on cuda, eager on cpu
    forward_path: str | None = None  # suite training; default: its rule
    step_path: str | None = None  # suite training; default: by the forward path
    activation_checkpointing: bool = False  # suite training
    implementations: tuple[str, ...] | None = None  # suite attention; default: all that it has
    repeats: int | None = None  # default: by the rule of profiler.py
    match: str | None = None  # "params", "state", "flops", "latency": match all to the first spec
    scale: str = "custom"
    reference_every: int | None = None  # cases between reference cases (drift check); None: off
