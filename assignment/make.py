"""Writes student.py: fipo.py's functions for the assignment, with empty bodies.

  python assignment/make.py student.py

Signatures and docstrings come from fipo.py, so they cannot drift from it. So do the helpers that
the functions call, which are copied as they are.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

FIPO = Path(__file__).parents[1] / "fipo.py"
# The functions to write, in the order of the problems, and their points.
POINTS = {
    "group_advantages": 10,
    "token_logprobs": 20,
    "future_kl": 20,
    "influence_weight": 15,
    "fipo_loss": 20,
    "add_gradients": 15,
}
INTRODUCTION = '''"""Your solutions. assignment/README.md explains each problem.

Replace each NotImplementedError. Do not change names, arguments or the helpers that are given.
"""

from __future__ import annotations

'''


def names_in_code(node: ast.AST) -> set[str]:
    """The names that a definition uses when it runs: all names but those in annotations."""
    if isinstance(node, ast.arg):
        return set()
    if isinstance(node, ast.AnnAssign):
        return names_in_code(node.value) if node.value else set()
    names = {node.id} if isinstance(node, ast.Name) else set()
    for field, value in ast.iter_fields(node):
        children = value if isinstance(value, list) else [value]
        for child in children:
            if isinstance(child, ast.AST) and field != "returns":
                names |= names_in_code(child)
    return names


def names_defined_by(node: ast.stmt) -> list[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return [target.id for target in targets if isinstance(target, ast.Name)]
    return []


def source_of(node: ast.stmt, lines: list[str]) -> str:
    decorators = getattr(node, "decorator_list", [])
    first = decorators[0].lineno if decorators else node.lineno
    return "\n".join(lines[first - 1 : node.end_lineno])


def imports_for(tree: ast.Module, used: set[str]) -> list[str]:
    """The imports of fipo.py that bind the names in `used`."""
    imports = []
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            node.names = [a for a in node.names if (a.asname or a.name.split(".")[0]) in used]
            if node.names:
                imports.append(ast.unparse(node))
    return imports


def empty(node: ast.FunctionDef, lines: list[str]) -> str:
    """The signature and docstring of a function, and a body that raises NotImplementedError."""
    end_of_docstring = node.body[0].end_lineno
    head = "\n".join(lines[node.lineno - 1 : end_of_docstring])
    return f"{head}\n    raise NotImplementedError"


def rule(heading: str) -> str:
    return "# " + "-" * (97 - len(heading)) + f" {heading}\n"


def student_file(source: str) -> str:
    tree = ast.parse(source)
    lines = source.splitlines()
    definitions = {}
    for node in tree.body:
        for name in names_defined_by(node):
            definitions[name] = node

    # 1) Helpers: what the functions call, and what these call in turn.
    used = set()
    to_visit = list(POINTS)
    while to_visit:
        for name in names_in_code(definitions[to_visit.pop()]) - used:
            used.add(name)
            if name in definitions:
                to_visit.append(name)
    helpers = [node for name, node in definitions.items() if name in used and name not in POINTS]

    # 2) Annotations of the signatures need no import, but editors look for them.
    text = INTRODUCTION + "\n".join(imports_for(tree, used | {"Any", "Tensor"}))
    text += "\n\n" + rule("Given: helpers of fipo.py")
    text += "\n\n\n".join(source_of(node, lines) for node in helpers)
    for number, (name, points) in enumerate(POINTS.items(), 1):
        text += "\n\n\n" + rule(f"Problem {number}: {points} points")
        text += empty(definitions[name], lines)
    return text + "\n"


def main(argv: list[str]) -> None:
    if len(argv) != 1 or argv[0].startswith("-"):
        sys.exit(__doc__)
    path = Path(argv[0])
    if path.exists():
        sys.exit(f"make.py: {path} exists, and your work may be in it: choose another name.")
    path.write_text(student_file(FIPO.read_text()))
    print(f"wrote {path}; grade it with: python assignment/grade.py {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
