"""The embedded corpus: documentation that every Python installation already has.

`pydoc_data.topics` (the language reference, a document per topic), then the docstrings of the standard library and of
this package's dependencies, a document per module. A docstring that occurs again (inherited, generated) is kept once.
With the dependencies it is about 27 MB of English in some 5,000 documents, read in some ten seconds on two cores.
Left out: tests, and source files above 1 MB, which are generated tables.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from t5x_like.data import docstrings

DEPENDENCIES = (
    "jax",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "tensorstore",
    "sentencepiece",
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
)
"""What this package requires, named here so that a checkout and an installed wheel read the same corpus; what these
require is read too, what extras bring is not."""
_LARGEST_SOURCE = 2**20
_SKIPPED_FOLDERS = frozenset({"test", "tests", "testing", "idle_test", "site-packages", "dist-packages", "pydoc_data"})


def read(packages: bool) -> list[str]:
    """The documents, in an order that depends on what is installed and on nothing else."""
    return list(_read(packages))


@functools.lru_cache(maxsize=1)
def _read(packages: bool) -> tuple[str, ...]:
    paths = _standard_library()
    if packages:
        paths += [path for name in sorted(_installed_dependencies()) for path in _sources(name)]
    seen: set[bytes] = set()
    documents = []
    for texts in (*_topics(), *docstrings.read_all(paths)):
        fresh = [text for text in texts if _is_new(text, seen)]
        if fresh:
            documents.append("\n\n".join(fresh) + "\n")
    return tuple(documents)


def _is_new(text: str, seen: set[bytes]) -> bool:
    digest = hashlib.blake2b(text.encode(errors="replace"), digest_size=12).digest()
    if digest in seen or not _is_unicode(text):
        return False
    seen.add(digest)
    return True


def _is_unicode(text: str) -> bool:
    """False for lone surrogates, which an escape in a docstring can spell and UTF-8 cannot."""
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
        and size <= _LARGEST_SOURCE
        and not _SKIPPED_FOLDERS.intersection(path.parts)
        and not path.name.startswith("test_")
        and not path.name.endswith("_test.py")
    )


def _standard_library() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in root.rglob("*.py"):
        if _is_wanted(path.relative_to(root), path.stat().st_size):
            found.append(path)
    return sorted(found)


def _installed_dependencies() -> dict[str, importlib.metadata.Distribution]:
    """Normalised name -> distribution, of DEPENDENCIES and of all that they require."""
    found: dict[str, importlib.metadata.Distribution] = {}
    waiting = list(DEPENDENCIES)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        for requirement in found[name].requires or ():
            match = re.match(r"[A-Za-z0-9._-]+", requirement)
            if match and not re.search(r";.*\bextra\b", requirement):
                waiting.append(match[0])
    return found


def _sources(name: str) -> list[Path]:
    found = []
    for file in importlib.metadata.distribution(name).files or ():
        path = Path(str(file.locate()))
        if file.suffix == ".py" and path.is_file() and _is_wanted(Path(*file.parts), path.stat().st_size):
            found.append(path)
    return sorted(found)
