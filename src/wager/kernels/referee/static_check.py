"""Reads a candidate's source before it runs, for what no honest kernel does. It names the line; the dynamic checks do not rely on it."""

from __future__ import annotations

import ast
from dataclasses import dataclass

FORBIDDEN_IMPORTS = {
    "wager.kernels.referee": "uses the baseline it is judged against",
    "threading": "starts threads",
    "multiprocessing": "starts processes",
    "concurrent": "starts threads",
    "subprocess": "starts processes",
    "inspect": "looks at its caller",
    "gc": "looks through the interpreter's memory",
    "weakref": "keeps hold of other people's tensors",
    "unittest": "replaces functions of others",
}
FORBIDDEN_NAMES = {
    "_getframe": "looks at its caller",
    "environ": "looks at the environment",
    "getenv": "looks at the environment",
    "Stream": "launches work on a stream of its own",
    "_exit": "ends the process",
    "__subclasses__": "looks for the baseline among the classes",
    "perf_counter": "reads the clock",
    "perf_counter_ns": "reads the clock",
    "_make_subclass": "makes tensors of another type",
    "__torch_function__": "makes tensors of another type",
    "__torch_dispatch__": "makes tensors of another type",
}
# Modules whose attributes are not the candidate's to set, beside those it imports.
OTHERS = {"torch", "time", "np", "numpy", "F", "sys", "os", "builtins"}
LIBRARY = {
    "linear", "conv1d", "conv2d", "conv3d", "scaled_dot_product_attention", "layer_norm", "rms_norm", "group_norm", "batch_norm",
    "softmax", "gelu", "silu", "embedding_bag", "matmul", "einsum", "bmm", "mm",
}  # fmt: skip


@dataclass(frozen=True)
class Complaint:
    line: int
    reason: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.reason}"


def check(source: str, operator: str, library: bool = True) -> list[Complaint]:
    """Complaints about a candidate's source. `library=False` also forbids the framework's own form of the operator.

    Raises SyntaxError when the source cannot be read.
    """
    tree = ast.parse(source)
    foreign = OTHERS | _imported(tree)
    found = [c for node in ast.walk(tree) for c in _of_node(node, library, foreign)]
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == operator:
            found += _of_class(node)
    return sorted(set(found), key=lambda c: (c.line, c.reason))


def _imported(tree: ast.AST) -> set[str]:
    """Names that some import binds."""
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    return {(alias.asname or alias.name).split(".")[0] for node in imports for alias in node.names}


def _of_node(node: ast.AST, library: bool, foreign: set[str]) -> list[Complaint]:
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        names = (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else [f"{node.module}.{a.name}" for a in node.names]
        )
        return [
            Complaint(node.lineno, f"imports {name}: {why}")
            for name in names
            for module, why in FORBIDDEN_IMPORTS.items()
            if name == module or name.startswith(module + ".")
        ]
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("setattr", "exec", "eval", "__import__")
    ):
        return [Complaint(node.lineno, f"calls {node.func.id}, which can change or hide anything")]
    if isinstance(node, (ast.Assign, ast.AugAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return [
            Complaint(node.lineno, f"assigns to {ast.unparse(t)}, which belongs to another module")
            for t in targets
            if _is_foreign(t, foreign)
        ]
    name = (
        getattr(node, "attr", None)
        or getattr(node, "id", None)
        or (node.name if isinstance(node, ast.FunctionDef) else None)
    )
    line = getattr(node, "lineno", 0)
    if name in FORBIDDEN_NAMES:
        return [Complaint(line, f"mentions {name}: {FORBIDDEN_NAMES[name]}")]
    if not library and isinstance(node, ast.Attribute) and name in LIBRARY:
        return [Complaint(line, f"calls the library's {name} where a kernel of its own is asked for")]
    return []


def _is_foreign(target: ast.AST, foreign: set[str]) -> bool:
    while isinstance(target, (ast.Attribute, ast.Subscript)):
        inner = target.value
        if isinstance(inner, ast.Name):
            return inner.id in foreign and isinstance(target, ast.Attribute)
        target = inner
    return False


def _of_class(node: ast.ClassDef) -> list[Complaint]:
    found = [
        Complaint(t.lineno, "catches errors and goes on: a fallback hides that the kernel does not work")
        for t in ast.walk(node)
        if isinstance(t, ast.Try)
    ]
    if not any(isinstance(f, ast.FunctionDef) and f.name == "forward" for f in node.body):
        found.append(Complaint(node.lineno, "has no forward of its own"))
    return found
