"""Training text that may be used: Python's own library (sources, docstrings, language reference), WikiText, and generated chats.

The library is read from the running interpreter, so nothing is downloaded. Every document belongs to a domain, and a fixed twentieth
of each domain, chosen by a hash of its name, is held out: never trained on, only measured.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from wager.models.demo.chats import generated_chats, question_about

DOMAINS = ("code", "docs", "wiki", "chat")
_SKIPPED = {
    "site-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "encodings",
    "__pycache__",
    "ensurepip",
    "config",
    "turtledemo",
}
_MAX_FILE_BYTES = 400_000


@dataclass(frozen=True)
class Document:
    domain: str
    name: str
    text: str

    @property
    def held_out(self) -> bool:
        return int(hashlib.sha256(f"{self.domain}/{self.name}".encode()).hexdigest(), 16) % 20 == 0


def documents(data: Path | None = None, chats: int = 24_000) -> Iterator[Document]:
    """Everything, in a fixed order. `data` is a folder with wikitext2/valid.txt; without it the wiki domain is empty."""
    for file in library_files():
        source = file.read_text(encoding="utf-8", errors="ignore")
        name = "/".join(file.parts[-3:])
        yield Document("code", name, source)
        yield from _documentation(file, source)
    yield from _topics()
    if data is not None:
        yield from _wiki(data / "wikitext2" / "valid.txt")
    for number, chat in enumerate(generated_chats(chats)):
        yield Document("chat", f"generated-{number}", chat)


def library_files() -> list[Path]:
    """The interpreter's own modules, without tests, tables and tools that are not written by hand."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for file in sorted(root.rglob("*.py")):
        inside = file.relative_to(root).parts
        if not _SKIPPED.intersection(inside) and "config-" not in inside[0] and file.stat().st_size <= _MAX_FILE_BYTES:
            files.append(file)
    return files


def _documentation(file: Path, source: str) -> Iterator[Document]:
    """Each public docstring as reference text, and once as an answer in a chat."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    module = file.stem if file.stem != "__init__" else file.parent.name
    for node, name in _named_nodes(tree, module):
        doc = ast.get_docstring(node)
        if not doc or len(doc) < 30 or len(doc) > 4000:
            continue
        signature = _signature(node, name)
        yield Document("docs", name, f"{signature}\n\n{inspect.cleandoc(doc)}\n")
        summary = " ".join(doc.split("\n\n")[0].split())
        if 20 <= len(summary) <= 400:
            yield Document("chat", name, question_about(name, signature, summary))


def _named_nodes(tree: ast.Module, module: str) -> Iterator[tuple[ast.Module | ast.ClassDef | ast.FunctionDef, str]]:
    yield tree, module
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            yield node, f"{module}.{node.name}"
            for inner in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                    yield inner, f"{module}.{node.name}.{inner.name}"


def _signature(node: ast.AST, name: str) -> str:
    if isinstance(node, ast.FunctionDef):
        return f"{name}({ast.unparse(node.args)})"
    return f"class {name}" if isinstance(node, ast.ClassDef) else f"module {name}"


def _topics() -> Iterator[Document]:
    """The language reference that `help()` shows."""
    from pydoc_data.topics import topics

    for name, text in topics.items():
        yield Document("docs", f"topic-{name}", text)


def _wiki(file: Path) -> Iterator[Document]:
    """Articles, with the marks of the tokenised edition undone."""
    lines: list[str] = []
    count = 0
    for line in file.read_text(encoding="utf-8").splitlines() + [" = end = "]:
        heading = line.startswith(" = ") and not line.startswith(" = = ")
        if heading and lines:
            yield Document("wiki", f"article-{count}", "\n".join(lines) + "\n")
            lines, count = [], count + 1
        if line.strip():
            lines.append(_plain(line.strip()))


def _plain(line: str) -> str:
    for mark, text in ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), ("<unk>", "something")):
        line = line.replace(mark, text)
    for mark in (",", ".", ";", ":", "!", "?", ")", "'s", "n't", "%"):
        line = line.replace(f" {mark}", mark)
    return line.replace("( ", "(").replace(" n't", "n't").replace("= = =", "###").replace("= =", "##")
