"""What a Python file says, read without importing it: names, constants, classes and their bases.

No torch: lists and plans of architectures cost milliseconds (spec.py).
"""

import ast
import re
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from cat_bench.errors import UserError

ROOT = Path(__file__).resolve().parents[1]  # where cat_bench and baselines lie
FUNCTION = re.compile(r"\s*(?:async )?def (\w+)")


def tree_of(path: Path) -> ast.Module:
    return _parsed(path, path.stat().st_mtime_ns)


@cache
def _parsed(path: Path, modified_ns: int) -> ast.Module:
    """The syntax tree; `modified_ns` makes an edited file a new entry of the cache."""
    try:
        source = path.read_text(encoding="utf-8")
        with suppress(SyntaxError):  # where a text in the file looks like code: the whole of it
            return ast.parse(outline(source))
        return ast.parse(source)
    except (SyntaxError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} is not valid Python: {error}.", "Repair or remove the file."
        ) from error


def outline(source: str) -> str:
    """The source with empty functions: nothing in them is read here, and most of it is in them."""
    kept: list[str] = []
    inside = -1  # indent of the function whose body is being left out; -1: none
    for line in source.split("\n"):
        indent = len(line) - len(line.lstrip())
        if inside >= 0 and (not line.strip() or indent > inside or line.lstrip()[0] == ")"):
            continue
        function = FUNCTION.match(line)
        inside = indent if function else -1
        kept.append(f"{line[:indent]}def {function[1]}(): pass" if function else line)
    return "\n".join(kept)


def summary(tree: ast.Module) -> str:
    """The first line of the docstring, without its full stop."""
    docstring = ast.get_docstring(tree) or "no docstring"
    return docstring.splitlines()[0].rstrip(".")


def defined(tree: ast.Module) -> set[str]:
    """Names that the top level defines or imports from elsewhere."""
    names = set(constants_of(tree))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            names.update(alias.asname or alias.name for alias in node.names)
    return names


def classes(tree: ast.Module) -> dict[str, ast.ClassDef]:
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def members_of(node: ast.ClassDef) -> list[str]:
    """Names that a class defines, or declares, in order; without its abstract methods."""
    found = []
    for part in node.body:
        if isinstance(part, ast.FunctionDef):
            decorators = [ast.unparse(decorator) for decorator in part.decorator_list]
            found += [] if "abstractmethod" in decorators else [part.name]
        elif isinstance(part, ast.Assign | ast.AnnAssign):
            targets = part.targets if isinstance(part, ast.Assign) else [part.target]
            found += [target.id for target in targets if isinstance(target, ast.Name)]
    return found


def constants_of(scope: ast.Module | ast.ClassDef) -> dict[str, ast.expr]:
    """name -> expression of every plain assignment directly in a module or class."""
    found = {}
    for node in scope.body:
        if isinstance(node, ast.Assign):
            found |= {
                target.id: node.value for target in node.targets if isinstance(target, ast.Name)
            }
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
            found[node.target.id] = node.value
    return found


def literal(node: ast.expr | None, constants: dict[str, ast.expr], otherwise: Any) -> Any:
    """The value of a literal, or of a name that stands for one; `otherwise` for anything else."""
    if isinstance(node, ast.Name):
        node = constants.get(node.id)
    if node is None:
        return otherwise
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        return otherwise


def lineage_of(path: Path, name: str) -> dict[tuple[Path, str], ast.ClassDef]:
    """(file, name) -> class: that of `path`, then its bases as far as `place_of` finds them."""
    found, waiting = {}, [(path, name)]
    for file, name in waiting:  # grows
        node = classes(tree_of(file)).get(name)
        if node:
            found[file, name] = node
        places = [
            place_of(file, text) for text in (map(ast.unparse, node.bases) if node else [name])
        ]
        waiting += [place for place in places if place not in waiting]
    return found


def place_of(path: Path, name: str) -> tuple[Path, str]:
    """Where a class that a file names stands: in a module of baselines, cat_bench or its own folder
    if it imports it from there, else in the file itself.
    """
    imported = {  # "dense" -> "baselines.dense"
        alias.asname or alias.name: f"{getattr(node, 'module', None) or ''}.{alias.name}".strip(".")
        for node in tree_of(path).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    first, dot, rest = name.partition(".")
    module, _, its_name = f"{imported.get(first, first)}{dot}{rest}".rpartition(".")
    ours = module.startswith(("baselines.", "cat_bench."))
    for folder in (path.parent, ROOT) if ours else (path.parent,):
        file = folder / f"{module.replace('.', '/')}.py"
        if file.is_file():
            return file, its_name
    return path, name
