"""What `-a` takes: a file name and settings, "cat:chunk_size=8". The directory is the registry.

Architectures, suites and exhibits are found by file name and read with `ast`: nothing is imported,
so a missing package or GPU breaks nothing, and `cat-bench list` is quick.

    parse("cat-8:max_len=4096").text     -> "cat:chunk_size=8,max_len=4096", less defaults
    parse("path/to/mine.py:width=512")   -> a user's own file, which needs no installation
"""

import ast
import difflib
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

from cat_bench import syntax
from cat_bench.errors import UserError
from cat_bench.packages import is_gpu_only, is_installed

Value = int | float | str | bool | None

PACKAGE = Path(__file__).resolve().parent
BASELINES = PACKAGE.parent / "baselines"
SUITE_FOLDERS = {
    "cat_bench.suites": PACKAGE / "suites",
    "recall_tasks": PACKAGE.parent / "recall_tasks",
}
EXHIBITS = PACKAGE / "paper"
TINY = {
    "num_layers": 2, "compressor_layers": 1, "vocab_size": 256, "window": 16, "key_width": 16,
}  # fmt: skip
TINY_DIVISOR, TINY_WIDTH = 16, 64  # 1024 -> 64, 2048 -> 128; heads are 64 wide
PRESET_NAME = re.compile(r"[^\s:,]+(?<!\.py)")  # what `parse` and lists with commas leave whole
OPTIONAL = ("forward_paths", "step_kind")  # of the class Architecture
NO_DEFAULT = object()  # a field whose default is absent or no literal


@dataclass(frozen=True)
class Spec:
    """An architecture's name and the settings that differ from its defaults, sorted by key."""

    name: str  # "cat", or a path that ends in .py
    overrides: dict[str, Value] = field(default_factory=dict, hash=False)
    typed: str = field(default="", compare=False)  # what the user wrote, for messages

    @cached_property
    def text(self) -> str:
        """The canonical text: parse(spec.text) == spec, and equal specs have equal texts."""
        settings = ",".join(f"{key}={_print(value)}" for key, value in self.overrides.items())
        return f"{self.name}:{settings}" if settings else self.name

    @property
    def given(self) -> frozenset[str]:
        """The settings that the user wrote: those of a preset are not, defaults written out are."""
        return frozenset(_key_values(self.typed, _split(self.typed)[1]))


class Source(NamedTuple):
    name: str
    module: str | None  # None: a user's file, imported by its path
    path: Path


class Field(NamedTuple):
    """One setting of a Config, as its source text says it."""

    type: str  # "int", "float | None", "Literal['a', 'b']"
    default: Any


@dataclass(frozen=True)
class ArchitectureInfo:
    name: str
    path: Path
    summary: str  # first line of the docstring
    fields: dict[str, Field]
    presets: dict[str, dict[str, Value]]
    decode_paths: tuple[str, ...]
    forward_paths: tuple[str, ...]
    requires: dict[str, str | tuple[str, ...]]  # REQUIRES as it stands there: see `packages`
    upstream_lacks: dict[str, str]  # setting -> why the authors' program cannot have it
    exports: frozenset[str]  # names that its top level defines or imports
    lacks: tuple[str, ...]  # of `members`, as far as its source tells

    def fastest(self, device: str) -> str:
        """The decode path that stands for this architecture in comparisons on `device`."""
        paths = self.decode_paths  # "eager", then the fastest first
        return paths[1] if device == "cuda" and len(paths) > 1 else "eager"

    def packages(self, kind: str, path: str) -> tuple[str, ...]:
        """What a "decode" or "forward" path needs: REQUIRES["forward upstream"] goes before
        REQUIRES["upstream"], which is for both kinds.
        """
        needed = self.requires.get(f"{kind} {path}", self.requires.get(path, ()))
        return (needed,) if isinstance(needed, str) else tuple(needed)

    def lacking(self, kind: str, path: str) -> tuple[str, ...]:
        """Those of `packages` that `is_installed` denies. Looks for them, imports nothing."""
        return tuple(name for name in self.packages(kind, path) if not is_installed(name))

    def needs_gpu(self, kind: str, path: str) -> bool:
        """Whether a package of that path has kernels for GPUs only."""
        return any(is_gpu_only(name) for name in self.packages(kind, path))


# --- from text to Spec ---------------------------------------------------------------------------


def parse(text: str) -> Spec:
    """Read "name" or "name:key=value,key=value"; a name may be a preset, which takes settings too.

    Raises UserError for an unknown architecture, an unknown key, or a value of the wrong type.
    """
    name, (_, settings) = name_of(text), _split(text)
    info, preset = _find(name)
    given = _key_values(text, settings)
    values = dict(preset)
    for key, value_text in given.items():
        if key not in info.fields:
            raise UserError(
                f"{text}: {info.name} has no setting '{key}'.{did_you_mean(key, info.fields)}",
                f"Its settings: {', '.join(sorted(info.fields))}.",
            )
        values[key] = _read(text, key, value_text, info.fields[key].type)
    differ = {k: v for k, v in sorted(values.items()) if not _same(v, info.fields[k].default)}
    return Spec(info.name, differ, text)


def name_of(text: str) -> str:
    """The name in a spec's text, without its settings: "./mine.py:width=2" -> "mine.py"."""
    name, _ = _split(text)
    return str(Path(name)) if name.endswith(".py") else name  # one file has one name


def resolve(name: str) -> Source:
    """Where an architecture's code is: an importable module, or a user's file."""
    if name.endswith(".py"):
        return Source(name, None, _user_file(name))
    if name in _own_files():
        path = _own_files()[name]
        return Source(name, f"{path.parent.name}.{name}", path)
    raise _unknown_architecture(name)


def describe(name: str) -> ArchitectureInfo:
    """All that the source of an architecture says about it."""
    return _read_architecture(name, resolve(name).path)


def tiny(spec: Spec) -> Spec:
    """The same architecture, small enough for seconds on a CPU: what --quick measures.

    What the user gave stays: only defaults and a preset's settings become small.
    """
    fields = describe(spec.name).fields
    values = {key: field.default for key, field in fields.items()} | spec.overrides
    changed = {key: size for key, size in TINY.items() if isinstance(values.get(key), int)}
    for key in ("width", "decoder_width"):
        width = values.get(key)
        if isinstance(width, int):
            changed[key] = max(TINY_WIDTH, width // TINY_DIVISOR)
    small = {key: size for key, size in changed.items() if key not in spec.given}
    settings = ",".join(f"{k}={_print(v)}" for k, v in {**spec.overrides, **small}.items())
    return replace(parse(f"{spec.name}:{settings}"), typed=spec.typed)


def _split(text: str) -> tuple[str, str]:
    """The name and the settings: "a/mine.py:width=2" -> ("a/mine.py", "width=2")."""
    if ".py:" in text:
        head, _, settings = text.rpartition(".py:")
        return f"{head}.py", settings
    name, _, settings = text.partition(":")
    return name.strip(), settings


def _find(name: str) -> tuple[ArchitectureInfo, dict[str, Value]]:
    """The architecture behind a file name, preset or path, and the preset's settings."""
    if name.endswith(".py"):
        return _read_architecture(name, _user_file(name)), {}
    known = architectures()
    for info in known:
        if info.name == name:
            return info, {}
    for info in known:
        if name in info.presets:
            return info, info.presets[name]
    raise _unknown_architecture(name)


def _user_file(name: str) -> Path:
    path = Path(name).expanduser()
    if not path.is_file():
        raise UserError(
            f"no architecture file at '{name}'.",
            "Give the path of a .py file with Config and Model.",
        )
    return path.resolve()


def _key_values(text: str, settings: str) -> dict[str, str]:
    """{"width": "2"} of "width=2". Raises UserError without a "=" and for a key given twice."""
    found: dict[str, str] = {}
    for piece in filter(None, (piece.strip() for piece in settings.split(","))):
        key, equals, value = (part.strip() for part in piece.partition("="))
        if not (key and equals and value):
            raise UserError(
                f"{text}: '{piece}' is not of the form key=value.", "Example: -a cat:chunk_size=8"
            )
        if key in found:
            raise UserError(f"{text}: '{key}' is given twice.", "Give it once.")
        found[key] = value
    return found


def _unknown_architecture(name: str) -> UserError:
    known = architectures()
    presets = sorted(preset for info in known for preset in info.presets)
    names = sorted(info.name for info in known)
    hint = f"Available: {', '.join(names)}. "
    if presets:
        hint += f"Presets: {', '.join(presets)}. "
    guess = did_you_mean(name, [*names, *presets])
    return UserError(
        f"unknown architecture '{name}'.{guess}", f"{hint}Your own: --arch path/to/file.py"
    )


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ " Did you mean: cat-8?" with a space before it, or "" where nothing is near."""
    near = difflib.get_close_matches(name.lower(), list(known), n=3)
    return f" Did you mean: {', '.join(near)}?" if near else ""


# --- values --------------------------------------------------------------------------------------


def _read(text: str, key: str, value: str, type_text: str) -> Value:
    """What `value` means for a field of this type. Raises UserError where it means nothing."""
    for option in _union(ast.parse(type_text, mode="eval").body):
        try:
            return _reader(option)(value)
        except ValueError:
            continue
    raise UserError(
        f"{text}: {key}='{value}' is not {_describe(type_text)}.", _example(key, type_text)
    )


def _union(node: ast.expr) -> list[ast.expr]:
    """The members of "a | b | None"."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return [*_union(node.left), *_union(node.right)]
    return [node]


def _reader(node: ast.expr) -> Callable[[str], Value]:
    """A function that reads one member type from text, or raises ValueError."""
    readers = {"int": int, "float": _read_float, "str": str, "bool": _read_bool, "None": _read_none}
    if isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("Literal"):
        choices = ast.literal_eval(node.slice)
        return lambda text: _read_choice(
            text, choices if isinstance(choices, tuple) else (choices,)
        )
    return readers.get(ast.unparse(node), _read_nothing)


def _read_bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


def _read_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):  # nan != nan would make two equal specs differ
        raise ValueError(text)
    return value


def _read_none(text: str) -> None:
    if text.lower() != "none":
        raise ValueError(text)


def _read_choice(text: str, choices: tuple) -> Value:
    for choice in choices:
        if text == _print(choice):
            return choice
    raise ValueError(text)


def _read_nothing(text: str) -> Value:
    raise ValueError(text)


def _print(value: Value) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _same(value: Value, default: object) -> bool:
    """Equal, and not only as True == 1."""
    return value == default and isinstance(value, bool) == isinstance(default, bool)


def _describe(type_text: str) -> str:
    words = {
        "int": "an integer",
        "float": "a finite number",
        "str": "a word",
        "bool": "true or false",
    }
    members = []
    for node in _union(ast.parse(type_text, mode="eval").body):
        name = ast.unparse(node)
        if name.startswith(("Literal[", "typing.Literal[")):
            name = "one of " + ast.unparse(node.slice).strip("()")  # type: ignore[attr-defined]
        members.append(words.get(name, name))
    return " or ".join(members)


def _example(key: str, type_text: str) -> str:
    examples = {"int": "8", "float": "0.5", "bool": "true", "str": "text"}
    first = ast.unparse(_union(ast.parse(type_text, mode="eval").body)[0])
    return f"Example: {key}={examples[first]}" if first in examples else f"Its type is {type_text}."


# --- what the folders hold -----------------------------------------------------------------------


def architectures() -> list[ArchitectureInfo]:
    """Every architecture file of the package: CAT first, then the baselines by name.

    Raises UserError where two things would have one name: the second could never be asked for.
    """
    files = _own_files().items()
    return list(_read_all(tuple((name, path, path.stat().st_mtime_ns) for name, path in files)))


@cache
def _read_all(files: tuple[tuple[str, Path, int], ...]) -> list[ArchitectureInfo]:
    """An edited file, of another time, is read again; a plan asks a thousand times."""
    found = [_read_architecture(name, path) for name, path, _ in files]
    owners = {info.name: info.path for info in found}
    for info in found:
        for preset in info.presets:
            if preset in owners:
                raise UserError(
                    f"{info.path}: the preset '{preset}' has a name that {owners[preset]} uses.",
                    "Give it another name.",
                )
            owners[preset] = info.path
    return found


def members() -> list[str]:
    """What every Model must have: the class Architecture of architecture.py, less OPTIONAL."""
    protocol = syntax.classes(syntax.tree_of(PACKAGE / "architecture.py"))["Architecture"]
    return [name for name in syntax.members_of(protocol) if name not in OPTIONAL]


def suites() -> list[tuple[str, str]]:
    """(name, summary) of every file in suites/ and recall_tasks/ that defines plan and measure."""
    return [(path.stem, syntax.summary(tree)) for _, path, tree in _suite_files()]


def suite_module(name: str) -> str:
    """The module to import for a suite's name. Raises UserError for an unknown one."""
    modules = {path.stem: f"{package}.{path.stem}" for package, path, _ in _suite_files()}
    if name not in modules:
        raise UserError(
            f"unknown suite '{name}'.{did_you_mean(name, modules)}",
            f"Available: {', '.join(sorted(modules))}.",
        )
    return modules[name]


def exhibits() -> list[tuple[str, str]]:
    """(name, title) of every exhibit in paper/: the paper's tables, its figures, then our own."""
    titles = {}
    for path in _python_files(EXHIBITS):
        title = syntax.constants_of(syntax.tree_of(path)).get("TITLE")
        if title is not None:
            titles[path.stem] = ast.literal_eval(title)
    return sorted(titles.items(), key=lambda item: _paper_order(item[0]))


def _paper_order(name: str) -> tuple[int, str, int]:
    """table2 before table10 before fig2 before crossover."""
    word = name.rstrip("0123456789")
    place = {"table": 0, "fig": 1}.get(word, 2)
    return (place, word, int(name[len(word) :] or 0))


def _own_files() -> dict[str, Path]:
    """Architecture name -> file: those that define both Config and Model."""
    candidates = [PACKAGE / "cat.py", *_python_files(BASELINES)]
    return {
        path.stem: path
        for path in candidates
        if path.is_file() and {"Config", "Model"} <= syntax.defined(syntax.tree_of(path))
    }


def _suite_files() -> list[tuple[str, Path, ast.Module]]:
    found = []
    for package, folder in SUITE_FOLDERS.items():
        for path in _python_files(folder):
            if {"plan", "measure"} <= syntax.defined(syntax.tree_of(path)):
                found.append((package, path, syntax.tree_of(path)))
    return found


def _python_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.py") if not path.name.startswith("_"))


# --- what their source says -----------------------------------------------------------------------


def _read_architecture(name: str, path: Path) -> ArchitectureInfo:
    tree = syntax.tree_of(path)
    constants = syntax.constants_of(tree)
    lineage = syntax.lineage_of(path, "Model")
    fields, requires = {}, {}
    for (file, _), node in reversed(syntax.lineage_of(path, "Config").items()):
        fields |= _fields(node, syntax.constants_of(syntax.tree_of(file)))
    for file in [*(file for file, _ in reversed(lineage)), path]:
        requires |= _checked_requires(
            file, _dict(file, "REQUIRES", syntax.constants_of(syntax.tree_of(file)))
        )
    return ArchitectureInfo(
        name=name,
        path=path,
        summary=syntax.summary(tree),
        fields=fields,
        presets=_checked_presets(path, _dict(path, "PRESETS", constants), fields),
        decode_paths=_paths(lineage, "decode_paths"),
        forward_paths=_paths(lineage, "forward_paths"),
        requires=requires,
        upstream_lacks=_dict(path, "UPSTREAM_LACKS", constants),
        exports=frozenset(syntax.defined(tree)),
        lacks=_lacks(lineage),
    )


def _paths(lineage: dict[tuple[Path, str], ast.ClassDef], kind: str) -> tuple[str, ...]:
    """Those of the first class that has some."""
    for (file, _), node in lineage.items():
        value = syntax.constants_of(node).get(kind)
        if value is not None:
            return syntax.literal(value, syntax.constants_of(syntax.tree_of(file)), ("eager",))
    return ("eager",)


def _lacks(lineage: dict[tuple[Path, str], ast.ClassDef]) -> tuple[str, ...]:
    """Those of `members` that no class has; none where one of them has a base that is not found,
    unless that is torch's.
    """
    bases = [
        (file, ast.unparse(base)) for (file, _), node in lineage.items() for base in node.bases
    ]
    unseen = {name for file, name in bases if syntax.place_of(file, name) not in lineage}
    if not lineage or not unseen <= {"nn.Module", "torch.nn.Module", "Module", "object"}:
        return ()
    have = {name for node in lineage.values() for name in syntax.members_of(node)}
    texts = [file.read_text(encoding="utf-8") for file in {file for file, _ in lineage}]
    return tuple(
        name
        for name in members()
        if name not in have  # then `self.name = ...` or `self.name, self.other = ...`
        and not any(re.search(rf"\bself\.{name}\b[^\n=(]*=", text) for text in texts)
    )


def _checked_presets(path: Path, presets: dict, fields: dict[str, Field]) -> dict:
    for name, settings in presets.items():
        if not isinstance(name, str) or not PRESET_NAME.fullmatch(name):
            raise UserError(
                f"{path}: the preset {name!r} has a name that no -a can give.",
                "It must be a text without space, ':' and ',' that does not end in .py.",
            )
        if not isinstance(settings, dict):
            raise UserError(
                f"{path}: the preset '{name}' is {settings!r}.",
                f'It must be a dict of settings: {{"{name}": {{"width": 512}}}}.',
            )
        for key in settings:
            if key not in fields:
                raise UserError(
                    f"{path}: the preset '{name}' sets '{key}', which its Config does not have."
                    f"{did_you_mean(str(key), fields)}",
                    f"Its settings: {', '.join(sorted(fields))}.",
                )
    return presets


def _checked_requires(path: Path, value: dict) -> dict[str, str | tuple[str, ...]]:
    for key, packages in value.items():
        names = [packages] if isinstance(packages, str) else packages
        if not isinstance(names, list | tuple) or not all(isinstance(n, str) for n in names):
            raise UserError(
                f"{path}: REQUIRES[{key!r}] is {packages!r}.",
                "It must be the name of a package, or a tuple of names.",
            )
    return value


def _dict(path: Path, name: str, constants: dict[str, ast.expr]) -> dict:
    """The literal dict of that name; empty where the file has none."""
    value = syntax.literal(constants[name], constants, None) if name in constants else {}
    if not isinstance(value, dict):
        raise UserError(
            f"{path}: {name} is not a literal dict.", "It is read without importing the file."
        )
    return value


def _fields(config: ast.ClassDef, constants: dict[str, ast.expr]) -> dict[str, Field]:
    """The annotated fields of a dataclass; the module's names (Rule = Literal[...]) resolved."""
    found = {}
    for node in config.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            annotation = constants.get(ast.unparse(node.annotation), node.annotation)
            if not ast.unparse(annotation).startswith(("ClassVar", "typing.ClassVar")):
                default = syntax.literal(node.value, constants, NO_DEFAULT)
                found[node.target.id] = Field(ast.unparse(annotation), default)
    return found
