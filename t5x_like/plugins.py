"""Plug-ins: files and modules of users that register extensions, and the trust that importing them needs.

`RunConfig.plugins` names plug-ins. An entry that ends in `.py` is a file beside the recipe; any other entry is an
installed module. A file is imported under its stem, so that a recipe and other plug-ins can import it by that name.

Importing a file executes it, so the user must have named it:
  - A Python recipe on the command line is code that the user runs; the plug-ins that it names are trusted with it.
  - A configuration in JSON (a run directory, `FILE.json`) executes nothing. Its plug-ins are imported only if the user
    names them by `--trust NAME`, if they are installed as entry points of the group `t5x_like.plugins`, or if this
    process has imported the same content already. The same holds for modules that its fields `module` name.

A run directory keeps a copy of each plug-in file with its SHA-256 digest, so that other commands can use the run
elsewhere. A copy that is missing or changed is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import importlib.machinery
import importlib.util
import json
import sys
import traceback
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from t5x_like.errors import ConfigError, ConfigProblem, SafetyError, UserError
from t5x_like.utils import trusted_urls
from t5x_like.utils.atomic_write import write_atomically
from t5x_like.utils.json_reader import parse_json, read_json

ENTRY_POINT_GROUP = "t5x_like.plugins"
FOLDER = "plugins"
"""Folder of a run directory with the copies of its plug-in files and their record."""
RECORD = "plugins.json"
_PACKAGE = __name__.partition(".")[0]


@dataclasses.dataclass(frozen=True)
class Plugin:
    """A plug-in that this process has imported.

    Attributes:
      name: Entry of `RunConfig.plugins`.
      path: File that was imported.
      source: Content of a plug-in file; None for an installed module, which is not copied.
    """

    name: str
    path: Path
    source: bytes | None

    @property
    def digest(self) -> str | None:
        """SHA-256 of the source in hexadecimal."""
        return None if self.source is None else hashlib.sha256(self.source).hexdigest()


_loaded: dict[str, Plugin] = {}
_trusted: set[str] = set()
_recipe_folders: dict[str, None] = {}
"""Folders of the Python recipes and plug-in files of this process, in the order of their use."""
_named_by_json: set[str] = set()
"""Modules and plug-ins that a configuration in JSON names, and that therefore need trust."""


def trust(names: Iterable[str]) -> None:
    """Allow the import of plug-ins and modules of these names, and requests to the URLs among them: the user has named
    them."""
    names = list(names)
    _trusted.update(names)
    trusted_urls.trust(names)


def is_file(name: str) -> bool:
    """Return whether a plug-in is a file rather than an installed module."""
    return name.endswith(".py")


def load_beside(names: Sequence[str], folder: Path) -> None:
    """Import the plug-ins of a Python recipe: files relative to its folder, or installed modules.

    Raises:
      ConfigError: a file or module that does not exist, or two files of the same name.
      UserError: a plug-in raised an exception.
    """
    _recipe_folders[str(folder.resolve())] = None
    _require_different_stems(names)
    for name in names:
        if is_file(name):
            path = folder / name
            if not path.is_file():
                expected = "a file relative to the recipe, or an installed module (without .py)"
                raise ConfigError([ConfigProblem("plugins", f"{name!r}, but no file {path}", expected)])
            _import_file(name, path)
        else:
            _import_installed(name, name)


def adopt(name: str, path: Path) -> None:
    """Note as a plug-in a file that has been executed already: a recipe that registers extensions itself."""
    _loaded[name] = Plugin(name, path, path.read_bytes())


def admit(text: str, folder: Path, source: str) -> None:
    """Import the plug-ins of a configuration in JSON, as far as the user trusts them; call it before parsing.

    Modules that other fields of the configuration name are not imported here; `import_named_module` asks for trust.

    Args:
      text: The JSON document. A malformed one names no plug-in; parsing it reports the problem.
      folder: Run directory that holds the copies of the plug-in files.
      source: Name of the document in messages.

    Raises:
      SafetyError: a plug-in that is not trusted, is missing, or differs from its recorded digest.
      UserError: a plug-in raised an exception.
    """
    document = _document(text)
    _named_by_json.update(named_modules(document))
    trusted_urls.note(document)
    names = document.get("plugins", [])
    names = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    _named_by_json.update(names)
    _require_different_stems(names)
    record = read_record(folder)
    needed = [name for name in names if not _may_load(name, record)]
    if needed:
        files = ", ".join(str(folder / FOLDER / Path(name).name) if is_file(name) else name for name in needed)
        options = " ".join(f"--trust {name}" for name in needed)
        raise SafetyError(
            f"{source} names code of its author ({files}), which was not imported. Read it; if you trust it, run the "
            f"same command with {options}"
        )
    for name in names:
        if is_file(name):
            _import_recorded(name, folder, record)
        else:
            _import_installed(name, _entry_points().get(name, name))


def named_modules(value: Any) -> set[str]:
    """Return the modules that fields called `module` name, at all depths of a JSON document."""
    if isinstance(value, list):
        return set().union(*map(named_modules, value))
    if not isinstance(value, dict):
        return set()
    own = value.get("module")
    return set().union({own} if isinstance(own, str) else (), *map(named_modules, value.values()))


def import_named_module(name: str, where: str) -> types.ModuleType:
    """Import a module that a field of a configuration names.

    A module that is not installed is looked up beside the recipes of this process and in the current folder, which the
    console script does not have on its import path.

    Args:
      where: Dotted path of the field, for the message.

    Raises:
      SafetyError: only a configuration in JSON names the module, not the user.
      ImportError: the module cannot be imported.
    """
    own = name.startswith(f"{_PACKAGE}.")
    if name in _named_by_json and not own and name not in _trusted and name not in _entry_points().values():
        raise SafetyError(
            f"{where}: found the module {name!r}, which only the configuration's author has named, so it was not "
            f"imported. If you trust it, run the same command with --trust {name}"
        )
    _find(name)
    return importlib.import_module(name)


def require_module(name: str, where: str) -> None:
    """Raise ConfigError if `import_named_module` would not find a module; nothing is imported."""
    if not _find(name):
        expected = "an installed module, or one in the current folder or beside the recipe"
        raise ConfigError([ConfigProblem(where, f"{name!r}, and no such module", expected)])


def unused_trust(names: Sequence[str]) -> list[str]:
    """Return those of the names given as --trust that nothing which this process has read names."""
    known = {*_named_by_json, *_loaded, *_entry_points(), *_entry_points().values(), *trusted_urls.noted()}
    return [name for name in names if name not in known and name not in {Path(other).name for other in known}]


def _find(name: str) -> bool:
    """Return whether the top-level package of a module exists; put the folder that holds it on the import path."""
    package = name.partition(".")[0]
    if package in sys.modules or importlib.util.find_spec(package) is not None:
        return True
    for folder in (*_recipe_folders, str(Path.cwd())):
        if importlib.machinery.PathFinder.find_spec(package, [folder]) is not None:
            # It stays there for what the module imports later, and for worker processes, which inherit the path.
            sys.path.append(folder)
            return True
    return False


def digests(names: Sequence[str]) -> dict[str, str | None]:
    """Return the digests of plug-ins that this process has imported; None for installed modules."""
    return {name: _loaded[name].digest for name in names if name in _loaded}


def read_record(folder: Path) -> dict[str, dict[str, str]]:
    """Return {plug-in file: {"path", "sha256"}} of a run directory; empty if it has none.

    Raises:
      SafetyError: the record cannot be read.
    """
    path = folder / FOLDER / RECORD
    try:
        document = read_json(path)
        return {
            str(name): {"path": str(entry["path"]), "sha256": str(entry["sha256"])} for name, entry in document.items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        raise SafetyError(
            f"{path}: found no record of plug-ins ({error}), expected the one that `train` wrote"
        ) from None


def require_unchanged(names: Sequence[str], folder: Path) -> None:
    """Compare the imported plug-ins with those that a run began with.

    Raises:
      SafetyError: a plug-in of the run has other content now.
    """
    record, now = read_record(folder), digests(names)
    changed = [name for name in now if name in record and now[name] != record[name]["sha256"]]
    if changed:
        lines = "\n".join(
            f"  {name}: {record[name]['sha256'][:16]} in the run, {(now[name] or '')[:16]} now" for name in changed
        )
        raise SafetyError(
            f"{folder} holds a run that began with other plug-ins (SHA-256):\n{lines}\nThe run's own files are in "
            f"{folder / FOLDER}. Restore them, or continue with the new ones by --allow-change plugins."
        )


def keep(names: Sequence[str], folder: Path) -> None:
    """Copy the imported plug-in files into a run directory, with a record of their origin and digest.

    Raises:
      OSError: the run directory cannot be written.
    """
    files = [_loaded[name] for name in names if name in _loaded and _loaded[name].source is not None]
    if not files:
        return
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    for plugin in files:
        assert plugin.source is not None
        write_atomically(folder / FOLDER / Path(plugin.name).name, plugin.source.decode("utf-8"))
    record = {plugin.name: {"path": str(plugin.path.resolve()), "sha256": plugin.digest} for plugin in files}
    write_atomically(folder / FOLDER / RECORD, json.dumps(record, indent=2) + "\n")


def _document(text: str) -> Mapping[str, Any]:
    try:
        document = parse_json(text)
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


def _may_load(name: str, record: Mapping[str, Mapping[str, str]]) -> bool:
    """Return whether a plug-in that a JSON document names may be imported, or has been imported already."""
    if name in _trusted or Path(name).name in _trusted:
        return True
    if not is_file(name):
        return name in _entry_points() or name in _entry_points().values() or name.startswith(f"{_PACKAGE}.")
    return name in _loaded and name in record and _loaded[name].digest == record[name]["sha256"]


def _entry_points() -> dict[str, str]:
    """Return name -> module of the installed plug-ins."""
    return {point.name: point.module for point in metadata.entry_points(group=ENTRY_POINT_GROUP)}


def _require_different_stems(names: Sequence[str]) -> None:
    stems = [Path(name).stem for name in names if is_file(name)]
    for name in names:
        stem = Path(name).stem
        if is_file(name) and (stems.count(stem) > 1 or not stem.isidentifier()):
            found = f"{name!r}" if stem.isidentifier() else f"{name!r}, whose stem cannot be imported"
            raise ConfigError(
                [ConfigProblem("plugins", found, "files with different stems that are Python identifiers")]
            )


def _import_recorded(name: str, folder: Path, record: Mapping[str, Mapping[str, str]]) -> None:
    """Import the copy of a plug-in file in a run directory after comparing its digest."""
    path = folder / FOLDER / Path(name).name
    if name not in record or not path.is_file():
        raise SafetyError(
            f"{path}: found no plug-in file with a recorded digest, expected the copy that `train` made of {name}"
        )
    digest, expected = hashlib.sha256(path.read_bytes()).hexdigest(), record[name]["sha256"]
    if digest != expected:
        raise SafetyError(
            f"{path}: found the SHA-256 {digest[:16]}, expected {expected[:16]}, recorded by the run: "
            "it has been changed. Restore the file."
        )
    _import_file(name, path)


def _import_file(name: str, path: Path) -> None:
    """Import a plug-in file under its stem, unless this process has imported the same content.

    Raises:
      ConfigError: the stem is the name of another module.
      UserError: the file raised an exception.
    """
    plugin = Plugin(name, path, path.read_bytes())
    known = _loaded.get(name)
    if known is not None and known.source == plugin.source:
        return
    module_name = path.stem
    present = sys.modules.get(module_name)
    if present is not None and _file_of(present) == path.resolve() and known is None:
        # The recipe has imported the file by its name.
        _loaded[name] = plugin
        return
    others = [other for other in _loaded.values() if other.path.stem == module_name]
    if not others and (present is not None or module_name in sys.stdlib_module_names):
        found = f"{name!r}, whose stem is the name of another module"
        raise ConfigError([ConfigProblem("plugins", found, "a file with a name of its own")])
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        with _executing(name, path):
            spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(module_name, None)
        raise
    _loaded[name] = plugin


def _import_installed(name: str, module_name: str) -> None:
    try:
        with _executing(name, None):
            module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        expected = "an installed module, or a file that ends in .py"
        raise ConfigError(
            [ConfigProblem("plugins", f"{name!r}, which cannot be imported ({error})", expected)]
        ) from None
    _loaded[name] = Plugin(name, _file_of(module) or Path(module_name), None)


def _file_of(module: types.ModuleType) -> Path | None:
    file = getattr(module, "__file__", None)
    return Path(file).resolve() if file else None


@contextlib.contextmanager
def _executing(name: str, path: Path | None) -> Iterator[None]:
    """Report an exception of a plug-in within the context as the user's error, with the line of the file."""
    try:
        yield
    except (UserError, ModuleNotFoundError):
        raise
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f":{frame.lineno}" for frame in frames if path is not None and Path(frame.filename) == path]
        raise UserError(
            f"the plug-in {path or name}{''.join(lines[-1:])} raised {type(error).__name__}: {error}"
        ) from error
