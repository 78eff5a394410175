"""Docstrings of Python source files, by parsing them: nothing is imported or run.

Knows the standard library only, so that it can run as a script in a process of its own: paths as a JSON list on
standard input, a list of docstrings per path on standard output.
"""

from __future__ import annotations

import ast
import concurrent.futures
import json
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_BLOCKS = ("body", "handlers", "orelse", "finalbody", "cases")


def docstrings(source: bytes) -> list[str]:
    """Docstrings of the module, its classes and functions in the order of the source; none if it does not parse."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return []
    return list(_walk(tree))


def _walk(node: ast.AST) -> Iterator[str]:
    if isinstance(node, _DOCUMENTED):
        text = ast.get_docstring(node)
        if text and text.strip():
            yield text.strip()
    for block in _BLOCKS:
        children = getattr(node, block, ())
        for child in children if isinstance(children, list) else ():
            yield from _walk(child)


def read_all(paths: Sequence[Path], workers: int = 2) -> list[list[str]]:
    """Docstrings of each file, read by `workers` processes; unreadable files have none."""
    shares = [[str(path) for path in paths[start::workers]] for start in range(workers)]
    command = [sys.executable, "-I", "-S", __file__]

    def work(share: list[str]) -> list[list[str]]:
        done = subprocess.run(command, input=json.dumps(share).encode(), stdout=subprocess.PIPE, check=True)
        return json.loads(done.stdout)

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        results = list(pool.map(work, shares))
    return [results[index % workers][index // workers] for index in range(len(paths))]


def _read(path: str) -> list[str]:
    try:
        return docstrings(Path(path).read_bytes())
    except OSError:
        return []


if __name__ == "__main__":
    sys.setrecursionlimit(5000)
    json.dump([_read(path) for path in json.load(sys.stdin)], sys.stdout)
