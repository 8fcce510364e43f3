"""More training text: the Python packages that are installed beside the interpreter, where their licence permits it.

Read are sources, functions with their docstring up front (as code benchmarks pose them), docstrings of modules and classes, and manuals.
A twentieth of the files is held out, with everything that was read from them. Files are read and tokenised in several processes.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import multiprocessing
import os
import re
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers

from wager.errors import UsageError
from wager.models.demo.corpus import Document, documents, library_files
from wager.models.demo.tokenizer import END_OF_TEXT, render

DOMAINS = ("code", "function", "docs", "wiki", "chat", "answers")
PROMPT_TOKENS = 128
_PERMISSIVE = re.compile(r"\b(MIT|0?BSD|Apache|PSF|Python Software Foundation|ISC)\b", re.IGNORECASE)
_OTHER = re.compile(r"GPL|GNU|Mozilla|MPL|Proprietary|NVIDIA|EULA", re.IGNORECASE)
_LINKED = re.compile(
    r"GPL-3\.0-or-later WITH GCC-exception-3\.1", re.IGNORECASE
)  # of bundled libraries, not of sources
_SKIPPED = re.compile(
    r"(^|/)(tests?|testing|_?vendor(ed)?|third_party|node_modules|locales?|migrations)/|_pb2|(^|/)test_"
)
_MANUALS = (".rst", ".md")
_MAX_FILE_BYTES = 200_000
_MAX_PACKAGE_BYTES = 20_000_000
_CHUNK_BYTES = 2_000_000


@dataclass(frozen=True)
class Source:
    """A file to read. whole: also as it is, not only its functions and docstrings."""

    name: str
    path: str
    size: int
    whole: bool = True


@dataclass(frozen=True)
class Piece:
    """A tokenised document; `prompt` is what stands before a function's body. `digest` tells equal texts."""

    domain: str
    held_out: bool
    digest: bytes
    tokens: np.ndarray
    prompt: np.ndarray | None = None


def find_packages() -> Path:
    """The site-packages folder that torch is installed in."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise UsageError("no installed packages were found; pass --packages DIR")
    return Path(spec.origin).parent.parent


def sources(folder: Path, most_bytes: int) -> list[Source]:
    """Files of permissively licensed packages, in the order of a hash of their names, so that any first part is a fair sample.

    Raises UsageError when the folder holds none.
    """
    found: list[Source] = []
    for package in importlib.metadata.distributions(path=[str(folder)]):
        if permissive(package.metadata):
            found += _capped(_package_sources(package), _MAX_PACKAGE_BYTES)
    if not found:
        raise UsageError(
            f"{folder} holds no package with a permissive licence; pass --packages DIR with *.dist-info folders in it"
        )
    return _capped(found, most_bytes)


def permissive(metadata: importlib.metadata.PackageMetadata) -> bool:
    """Whether the licence that a package declares is of the MIT, BSD, Apache or PSF kind, and names no other."""
    known = [line for key in ("License-Expression", "License", "Classifier") for line in metadata.get_all(key) or []]
    classifiers = [k for k in known if k.startswith("License ::")]
    stated = [k.splitlines()[0] for k in known if k.strip() and " :: " not in k]
    text = _LINKED.sub("", "\n".join(stated + classifiers))
    return bool(_PERMISSIVE.search(text)) and not _OTHER.search(text)


def _package_sources(package: importlib.metadata.Distribution) -> Iterator[Source]:
    for file in package.files or []:
        name = file.as_posix()
        readable = file.suffix == ".py" or file.suffix in _MANUALS or file.name == "METADATA"
        if readable and not name.startswith("..") and not _SKIPPED.search(name):
            path = Path(str(package.locate_file(file)))
            if path.is_file() and 200 <= (size := path.stat().st_size) <= _MAX_FILE_BYTES:
                yield Source(name, str(path), size)


def _capped(files: Iterator[Source] | list[Source], most_bytes: int) -> list[Source]:
    kept, total = [], 0
    for source in sorted(files, key=lambda s: hashlib.sha256(s.name.encode()).digest()):
        total += source.size
        if total > most_bytes:
            break
        kept.append(source)
    return kept


def texts_of(source: Source) -> Iterator[tuple[str, str, str | None]]:
    """(domain, text, prompt of a function) of everything that a file gives."""
    text = Path(source.path).read_text(encoding="utf-8", errors="ignore")
    if not source.path.endswith(".py"):
        body = text.split("\n\n", 1)[-1] if source.path.endswith("METADATA") else text
        if len(body) >= 200:
            yield "docs", body.strip() + "\n", None
        return
    if "generated" in text[:1000].lower() or max(map(len, text.splitlines()), default=0) > 1000:
        return
    if source.whole:
        yield "code", text, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return
    lines = text.splitlines(keepends=True)
    imports = [
        lines[n.lineno - 1]
        for n in tree.body
        if isinstance(n, ast.Import | ast.ImportFrom) and n.end_lineno == n.lineno
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            yield from _function(node, lines, imports)
        elif source.whole and isinstance(node, ast.Module | ast.ClassDef):
            doc = ast.get_docstring(node)
            if doc and len(doc) >= 300:
                yield "docs", inspect.cleandoc(doc) + "\n", None


def _function(node: ast.FunctionDef, lines: list[str], imports: list[str]) -> Iterator[tuple[str, str, str | None]]:
    """A function at the left margin; one in three stands below some of its module's imports."""
    doc = node.body[0]
    if len(node.body) < 2 or not (
        isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant) and isinstance(doc.value.value, str)
    ):
        return
    end, after_doc = node.end_lineno or 0, doc.end_lineno or 0
    whole = textwrap.dedent("".join(lines[node.lineno - 1 : end]))
    head = textwrap.dedent("".join(lines[node.lineno - 1 : after_doc]))
    if not 60 <= len(whole) <= 8000 or not whole.startswith(head):
        return
    above = "".join(imports[:3]) + "\n\n" if imports and hash_of(whole)[0] % 3 == 0 else ""
    yield "function", above + whole, above + head


def hash_of(text: str) -> bytes:
    return hashlib.blake2b(text.encode(errors="ignore"), digest_size=8).digest()


_tokenizer: tokenizers.Tokenizer | None = None


def _start_worker(tokenizer_file: str) -> None:
    global _tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _tokenizer = tokenizers.Tokenizer.from_file(tokenizer_file)


def _encode(rows: Sequence[tuple[str, bool, str, str | None]]) -> list[Piece]:
    assert _tokenizer is not None
    end = _tokenizer.token_to_id(END_OF_TEXT)
    pieces = []
    for domain, held_out, text, prompt in rows:
        tokens = np.array([*_tokenizer.encode(text).ids, end], np.uint16)
        head = None if prompt is None else np.array(_tokenizer.encode(prompt).ids[-PROMPT_TOKENS:], np.uint16)
        pieces.append(Piece(domain, held_out, hash_of(text), tokens, head))
    return pieces


def _read_files(files: list[Source]) -> list[Piece]:
    rows = []
    for source in files:
        held = Document("code", source.name, "").held_out
        rows += [(domain, held, text, prompt) for domain, text, prompt in texts_of(source)]
    return _encode(rows)


def _read_documents(data: Path | None, chats: int) -> list[Piece]:
    """What the factory reads for every pair, and questions with answers from medquad/*.jsonl in `data`."""
    rows = [(d.domain, d.held_out, d.text, None) for d in documents(data, chats)]
    file = None if data is None else data / "medquad" / "medquad_subset.jsonl"
    if file is not None and file.exists():
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines()):
            row = json.loads(line)
            turns = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
            text = render(turns) if number % 2 else f"{row['question']}\n\n{row['answer']}\n"
            rows.append(("answers", Document("answers", row["question"], "").held_out, text, None))
    return _encode(rows)


class Reading:
    """Files being read in other processes: started at once, so that this one can do something else until `write`."""

    def __init__(
        self,
        folder: Path | None,
        data: Path | None,
        tokenizer_file: Path,
        most_bytes: int,
        chats: int,
        processes: int | None = None,
    ):
        listed = [Source("/".join(f.parts[-3:]), str(f), f.stat().st_size, whole=False) for f in library_files()]
        listed += sources(folder or find_packages(), most_bytes)
        self._pool = ProcessPoolExecutor(
            processes or os.cpu_count(), multiprocessing.get_context("fork"), _start_worker, (str(tokenizer_file),)
        )
        self._parts: list[Future[list[Piece]]] = [self._pool.submit(_read_documents, data, chats)]
        chunk: list[Source] = []
        for source in listed:
            chunk.append(source)
            if sum(s.size for s in chunk) >= _CHUNK_BYTES:
                self._parts.append(self._pool.submit(_read_files, chunk))
                chunk = []
        self._parts.append(self._pool.submit(_read_files, chunk))

    def write(self, out: Path, seed: int = 0) -> dict[str, int]:
        """train.npy, the same by domain, heldout-<domain>.npy, and the prompts of functions (prompts-train.npz, prompts-heldout.npz); tokens of each stream."""
        with self._pool:
            pieces = [piece for part in self._parts for piece in part.result()]
        unique = list({piece.digest: piece for piece in pieces}.values())
        rng = np.random.default_rng(seed)
        kept = [p for p in unique if not p.held_out]
        np.save(out / "train.npy", np.concatenate([kept[i].tokens for i in rng.permutation(len(kept))]))
        sizes = {"train": sum(len(p.tokens) for p in kept)}
        for domain in DOMAINS:
            for name, wanted in (("train", False), ("heldout", True)):
                found = [p.tokens for p in unique if p.domain == domain and p.held_out == wanted]
                if found:
                    stream = np.concatenate([found[i] for i in rng.permutation(len(found))])
                    np.save(out / f"{name}-{domain}.npy", stream)
                    sizes[f"{name} {domain}"] = len(stream)
        for name, wanted in (("train", False), ("heldout", True)):
            heads = [p.prompt for p in unique if p.prompt is not None and p.held_out == wanted]
            padded = np.zeros((len(heads), PROMPT_TOKENS), np.uint16)
            for row, head in zip(padded, heads, strict=True):
                row[PROMPT_TOKENS - len(head) :] = head
            np.savez(out / f"prompts-{name}.npz", prompts=padded, lengths=np.array([len(h) for h in heads], np.int64))
            sizes[f"{name} prompts of functions"] = len(heads)
        return sizes
