"""An architecture file given by its path: imported, its faults told in a sentence, its text hashed.

What it imports is looked for in its own folder first, as Python does for a script. Whatever it
raises while it is imported, or while its Config and Model are made and asked, becomes a UserError:
the file, the line, the error. The project's own files are left alone: they keep their tracebacks.

    with running(source, "building its Model"):
        model = module.Model(config, "eager")
"""

import ast
import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

from cat_bench.errors import UserError
from cat_bench.packages import BY_MODULE, install_command
from cat_bench.spec import Source

MAX_TEXT = 300  # characters of an error's own words


class FileFault(UserError):
    """A user's file raised `error`, which is also the cause of this one."""

    def __init__(self, message: str, error: BaseException):
        super().__init__(message, "Repair the file; --debug shows the traceback.")
        self.error = error


@contextmanager
def running(source: Source, doing: str) -> Iterator[None]:
    """Around code of a user's file; `doing` says what is asked of it ("importing it").

    Raises UserError in place of what that code raises. Does nothing for the project's own files.
    """
    if source.module is not None:
        yield
        return
    with importable(source):
        try:
            yield
        except UserError:
            raise
        except (Exception, SystemExit) as error:  # the code is not ours: it may raise anything
            raise explained(source, doing, error) from error


def explained(source: Source, doing: str, error: BaseException) -> UserError:
    """One sentence for what the file of `source` raised: its name, the error, the line."""
    if isinstance(error, ImportError):
        return _missing_import(source, error)
    if isinstance(error, SyntaxError):  # also of a file that this one imports
        where = f"{error.filename}, line {error.lineno}"
        return UserError(
            f"{source.path} is not valid Python: {error.msg} ({where}).", "Repair the file."
        )
    said = " ".join(str(error).split())[:MAX_TEXT].rstrip(".")
    name = type(error).__name__
    text = f"{name}: {said}" if said else name
    return FileFault(
        f"{source.path} fails: {doing} raised {text}{_place(source.path, error)}.", error
    )


def _place(path: Path, error: BaseException) -> str:
    """ " (line 7)": where the error came up, in the file or in one beside it. Empty: in neither."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).parent == path.parent
    ]
    if not frames:
        return ""
    last = Path(frames[-1].filename)
    beside = "" if last == path else f"{last.name}, "
    return f" ({beside}line {frames[-1].lineno})"


def _missing_import(source: Source, error: ImportError) -> UserError:
    """What is imported in vain. A command installs only what packages.py knows: a package of some
    other module's name may be anybody's.
    """
    path, place = source.path, _place(source.path, error)
    module = (error.name or "").partition(".")[0]
    if not module:
        return UserError(f"{path} cannot be imported: {error}{place}.", "Repair the file.")
    if importlib.util.find_spec(module):
        hint = f"The module {module} is there, but has no such name: look at it, or its version."
        return UserError(f"{path} cannot be imported: {error}{place}.", hint)
    if module in BY_MODULE:
        return UserError(
            f"{path} imports the package {module}, which is not installed{place}.",
            f"It must be installed: {install_command(module)}",
        )
    return UserError(
        f"{path} imports {module}, which is neither installed nor beside the file{place}.",
        f"Put {module}.py into {path.parent}, or install the package that has this module.",
    )


# --- the folder of the file ----------------------------------------------------------------------

_found_beside: dict[str, Path] = {}  # module -> the folder of the user's file that it lies beside


def import_file(path: Path) -> ModuleType:
    """Run the file as a module, anew at each call: it may have been edited."""
    name = f"cat_bench_user_{path.stem}"
    import_spec = importlib.util.spec_from_file_location(name, path)
    if import_spec is None or import_spec.loader is None:
        raise ImportError(f"{path} is no Python source file")
    module = importlib.util.module_from_spec(import_spec)
    sys.modules[name] = module  # dataclasses and pickling of types look it up here
    import_spec.loader.exec_module(module)
    return module


@contextmanager
def importable(source: Source) -> Iterator[None]:
    """The folder of a user's file comes first where modules are looked for.

    Two such files may each have a helper.py beside them, so those of other folders are forgotten.
    """
    folder = source.path.parent
    if source.module is not None or folder in (Path(entry).resolve() for entry in sys.path):
        yield
        return
    for name in [name for name, home in _found_beside.items() if home != folder]:
        sys.modules.pop(name, None)
        del _found_beside[name]
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        new = [name for name in set(sys.modules) - before if _lies_beside(name, folder)]
        _found_beside.update(dict.fromkeys(new, folder))


def _lies_beside(name: str, folder: Path) -> bool:
    """Whether a loaded module is a file in `folder`, or in a package there."""
    file = getattr(sys.modules[name], "__file__", None)
    return file is not None and Path(file) in _files(folder, name)


def _files(folder: Path, module: str) -> list[Path]:
    """What `import module` may run of `folder`: module.py, or all files of a package. Sorted."""
    top = module.partition(".")[0]
    file = folder / f"{top}.py"
    return [file] if file.is_file() else sorted((folder / top).rglob("*.py"))


# --- its version ---------------------------------------------------------------------------------


def source_hash(source: Source) -> str | None:
    """SHA-256 over a user's file and what it imports from its folder; None for our own files.

    Imports are read from the source, also those inside of functions; one by a computed name is not.
    """
    if source.module is not None:
        return None
    folder = source.path.parent
    found: set[Path] = set()
    waiting = [source.path]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += [file for name in _imports(path) for file in _files(folder, name)]
    return hash_of(folder, found)


def hash_of(root: Path, files: Iterable[Path]) -> str:
    """SHA-256 over the names (below `root`) and contents of files, in sorted order."""
    total = hashlib.sha256()
    for name, path in sorted((path.relative_to(root).as_posix(), path) for path in files):
        total.update(f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


def _imports(path: Path) -> set[str]:
    """Names of all modules that the source imports; of `from . import x` the x."""
    names: set[str] = set()
    with suppress(SyntaxError, ValueError):  # a file that cannot be run imports nothing
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Import):
                names.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                names.update([node.module] if node.module else [a.name for a in node.names])
    return names
