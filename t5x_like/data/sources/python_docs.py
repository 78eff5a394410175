"""The embedded corpus: documentation that every Python installation already has.

The documents are `pydoc_data.topics` (the language reference, one document per topic), followed by the docstrings of
the standard library and of this package's dependencies (one document per module). A docstring that occurs more than
once, because it is inherited or generated, is kept once. With the dependencies the corpus has about 27 MB of English
text in about 5,000 documents and takes about ten seconds to read on two cores. Tests are left out, and so are source
files above 1 MB, which are generated tables.

Source files are parsed, never imported or run. This module imports the standard library only, so that `read_all` can
run it as a script in separate processes: paths as a JSON list on standard input, a list of docstrings per path as JSON
on standard output.
"""

from __future__ import annotations

import ast
import concurrent.futures
import functools
import hashlib
import importlib.metadata
import json
import re
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

READ_SECONDS = 1800.0
"""Limit of the time to read the source files, which takes about ten seconds."""
DEPENDENCIES = (
    "jax",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "tensorstore",
    "sentencepiece",
    "tokenizers",
    "pyarrow",
    "seqio",
    "tensorflow-datasets",
    "tensorflow",
    "pydantic",
    "tyro",
    "rich",
    "tensorboardX",
    "matplotlib",
    "jinja2",
    "msgpack",
    "pyyaml",
    "scipy",
    "filelock",
)
"""Dependencies of this package. They are listed here so that a checkout and an installed wheel read the same corpus.
Their own requirements are read too; requirements of extras are not."""
_MAX_SOURCE_BYTES = 2**20
_SKIPPED_FOLDERS = frozenset({"test", "tests", "testing", "idle_test", "site-packages", "dist-packages", "pydoc_data"})
_DOCUMENTED_NODES = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_BLOCK_FIELDS = ("body", "handlers", "orelse", "finalbody", "cases")


def read(packages: bool) -> list[str]:
    """Return the documents in an order that depends only on the installed packages.

    Args:
      packages: Also read the docstrings of the dependencies.
    """
    return list(_read(packages))


@functools.lru_cache(maxsize=1)
def _read(packages: bool) -> tuple[str, ...]:
    paths = _standard_library()
    if packages:
        paths += [path for name in sorted(_installed_dependencies()) for path in _sources(name)]
    seen: set[bytes] = set()
    documents = []
    for texts in (*_topics(), *read_all(paths)):
        new_texts = [text for text in texts if _is_new(text, seen)]
        if new_texts:
            documents.append("\n\n".join(new_texts) + "\n")
    return tuple(documents)


def _is_new(text: str, seen: set[bytes]) -> bool:
    digest = hashlib.blake2b(text.encode(errors="replace"), digest_size=12).digest()
    if digest in seen or not _is_unicode(text):
        return False
    seen.add(digest)
    return True


def _is_unicode(text: str) -> bool:
    """Return False for lone surrogates, which a docstring can contain as escapes and UTF-8 cannot encode."""
    return not re.search("[\ud800-\udfff]", text)


def _topics() -> Iterator[list[str]]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # Debian's python3-minimal
        return
    for name in sorted(topics):
        yield [topics[name].strip()]


def _is_wanted(path: Path, size: int) -> bool:
    return (
        path.suffix == ".py"
        and size <= _MAX_SOURCE_BYTES
        and not _SKIPPED_FOLDERS.intersection(path.parts)
        and not path.name.startswith("test_")
        and not path.name.endswith("_test.py")
    )


def _standard_library() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(path for path in root.rglob("*.py") if _is_wanted(path.relative_to(root), path.stat().st_size))


def _installed_dependencies() -> dict[str, importlib.metadata.Distribution]:
    """Return the installed distributions of DEPENDENCIES and of all their requirements, by normalised name."""
    distributions: dict[str, importlib.metadata.Distribution] = {}
    queue = list(DEPENDENCIES)
    while queue:
        name = re.sub(r"[-_.]+", "-", queue.pop()).lower()
        if name in distributions:
            continue
        try:
            distributions[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        for requirement in distributions[name].requires or ():
            match = re.match(r"[A-Za-z0-9._-]+", requirement)
            if match and not re.search(r";.*\bextra\b", requirement):
                queue.append(match[0])
    return distributions


def _sources(name: str) -> list[Path]:
    """Return the source files of a distribution."""
    paths = []
    for file in importlib.metadata.distribution(name).files or ():
        path = Path(str(file.locate()))
        if file.suffix == ".py" and path.is_file() and _is_wanted(Path(*file.parts), path.stat().st_size):
            paths.append(path)
    return sorted(paths)


# Docstrings of source files.


def docstrings(source: bytes) -> list[str]:
    """Return the docstrings of a module, its classes and functions in source order; none if it does not parse."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return []
    return list(_walk(tree))


def _walk(node: ast.AST) -> Iterator[str]:
    if isinstance(node, _DOCUMENTED_NODES):
        text = ast.get_docstring(node)
        if text and text.strip():
            yield text.strip()
    for field in _BLOCK_FIELDS:
        children = getattr(node, field, ())
        for child in children if isinstance(children, list) else ():
            yield from _walk(child)


def read_all(paths: Sequence[Path], workers: int = 2) -> list[list[str]]:
    """Return the docstrings of each file, read by `workers` processes. Unreadable files have none."""
    # Worker w reads the paths w, w + workers, w + 2 * workers, ...
    paths_of_workers = [[str(path) for path in paths[start::workers]] for start in range(workers)]
    # -I and -S: no site packages, whose import would take longer than the work.
    command = [sys.executable, "-I", "-S", __file__]

    def run_worker(worker_paths: list[str]) -> list[list[str]]:
        text = json.dumps(worker_paths).encode()
        try:
            process = subprocess.run(command, input=text, stdout=subprocess.PIPE, check=True, timeout=READ_SECONDS)
        except subprocess.TimeoutExpired:
            # As a script, this module imports the standard library only.
            from t5x_like.errors import DataError

            raise DataError(
                f"the docstrings of the installed packages were not read within {READ_SECONDS:g} s, expected about ten "
                "seconds; check the file system of this Python installation"
            ) from None
        return json.loads(process.stdout)

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        results = list(pool.map(run_worker, paths_of_workers))
    return [results[index % workers][index // workers] for index in range(len(paths))]


def _docstrings_of_file(path: str) -> list[str]:
    try:
        return docstrings(Path(path).read_bytes())
    except OSError:
        return []


if __name__ == "__main__":
    sys.setrecursionlimit(5000)
    json.dump([_docstrings_of_file(path) for path in json.load(sys.stdin)], sys.stdout)
