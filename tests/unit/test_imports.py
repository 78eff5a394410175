"""Who stands on whom: imports only go down, never in a circle, and no room knows what it must not know."""

from __future__ import annotations

import ast
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import t5x_like

ROOT = Path(t5x_like.__file__).parent
TENSORFLOW = ("tensorflow", "tensorflow_datasets", "tensorflow_text", "seqio", "clu")

# From the ground up. A room imports rooms of lower floors only; rooms of one floor do not know each other.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("config", "kernels", "monitoring"),
    ("planning.topologies",),
    ("partitioning", "run_directory", "interruption", "watchdog", "outputs"),
    ("data", "models", "training", "checkpoints"),
    ("program", "inspection", "bases"),
    ("interop", "planning"),
    ("decoding",),
    ("evaluation", "embedding", "launching", "serving"),
    ("export",),
    ("overview",),
    ("session",),
    ("trainer",),
    ("commands", "studies"),
    ("cli",),
    ("__main__",),
)

LIGHT = ("", "config", "planning.topologies", "cli", "commands", "data", "inspection", "launching")

# What a room must not know, by prefix of the imported module.
MUST_NOT_KNOW: dict[str, tuple[str, ...]] = {
    "data": ("jax", "flax", "optax", "orbax"),
    "inspection": ("jax", "flax", "optax", "orbax"),
    "models": ("jax.sharding", "jax.experimental.mesh_utils", "optax", "orbax", "t5x_like.training", "t5x_like.data"),
    "kernels": ("t5x_like.models", "t5x_like.config", "flax", "optax"),
    "partitioning": ("t5x_like.models", "t5x_like.data", "flax", "optax", "orbax"),
    "training": ("orbax", "t5x_like.data", "t5x_like.cli"),
    "checkpoints": ("t5x_like.models", "t5x_like.trainer", "flax", "optax"),
    "monitoring": ("t5x_like", "jax", "flax"),
    "launching": ("jax", "flax", "optax", "orbax", "numpy"),
    "run_directory": ("jax",),
    "cli": ("flax", "optax", "orbax"),
    "commands": ("flax", "optax", "orbax"),
}
ONLY_KNOWS: dict[str, tuple[str, ...]] = {
    "config": ("pydantic", "pydantic_core", "tyro"),
    "kernels": ("jax", "numpy"),
}
# Of partitioning, models name logical axes and nothing else; of monitoring, the step needs the metric tree, and data
# how text of unknown origin is made safe to print.
ONLY_FROM_ROOM: dict[tuple[str, str], tuple[str, ...]] = {
    ("models", "partitioning"): ("t5x_like.partitioning.constrain",),
    ("data", "monitoring"): ("t5x_like.monitoring.text",),
    ("training", "monitoring"): ("t5x_like.monitoring.metrics",),
}


@dataclasses.dataclass(frozen=True)
class Import:
    module: str
    """The imported module, as far as the statement names one."""
    line: int
    eager: bool
    """Executed when the importing module is."""


def module_name(path: Path) -> str:
    parts = ("t5x_like", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(ROOT.rglob("*.py")) if "_configs" not in path.parts}


def imports(path: Path) -> list[Import]:
    """Every import of a module, wherever it stands."""

    def visit(node: ast.AST, eager: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, eager) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            assert node.module
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield Import(full if full in MODULES else node.module, node.lineno, eager)
        type_checking = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        inner = (
            eager and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not type_checking
        )
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inner)

    return list(visit(ast.parse(path.read_text()), True))


IMPORTS = {name: imports(path) for name, path in MODULES.items()}


def room(module: str) -> str:
    """The table of machines is a room of its own: plans are made far above it, meshes and launchers need it too."""
    name = module.partition(".")[2]
    return name if name == "planning.topologies" else name.partition(".")[0]


def under(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(f"{prefix}.")


def eager_closure(start: str) -> dict[str, str]:
    """Every module that importing `start` imports, by way of our own, and the one that imports it."""
    seen = {start: ""}
    todo = [start]
    while todo:
        name = todo.pop()
        for found in IMPORTS.get(name, ()):
            parents = [".".join(found.module.split(".")[:depth]) for depth in range(1, found.module.count(".") + 2)]
            for module in parents if found.eager else ():
                if module not in seen:
                    seen[module] = name
                    todo.append(module)
    return seen


def test_every_room_has_its_floor() -> None:
    known = {name for floor in FLOORS for name in floor}
    assert {room(module) for module in MODULES} - {""} <= known


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module: str) -> None:
    floor_of = {name: floor for floor, names in enumerate(FLOORS) for name in names}
    own = room(module)
    for found in IMPORTS[module]:
        other = room(found.module) if under(found.module, "t5x_like") else ""
        if not other or other == own:
            continue
        where = f"{MODULES[module]}:{found.line} imports {found.module}"
        assert own, f"{where}: importing the package must stay light"
        assert floor_of[other] < floor_of[own], f"{where}: {other} is not below {own}"
        allowed = ONLY_FROM_ROOM.get((own, other))
        assert allowed is None or found.module in allowed, f"{where}: of {other}, {own} may know {allowed} only"


@pytest.mark.parametrize("module", MODULES)
def test_rooms_do_not_know_what_they_must_not(module: str) -> None:
    own = room(module)
    for found in IMPORTS[module]:
        where = f"{MODULES[module]}:{found.line} imports {found.module}"
        if not under(found.module, f"t5x_like.{own}"):
            assert not any(under(found.module, prefix) for prefix in MUST_NOT_KNOW.get(own, ())), where
        top = found.module.partition(".")[0]
        assert top not in ("transformers", "pickle", "cloudpickle", "dill", "joblib"), where
        # torch reads its own files of tensors, and is asked for then only.
        assert top != "torch" or (module == "t5x_like.interop.torch_file" and not found.eager), where
        if own in ONLY_KNOWS and not under(found.module, f"t5x_like.{own}"):
            assert top in sys.stdlib_module_names or top in ONLY_KNOWS[own], where


def test_no_circles() -> None:
    """Modules, not rooms: a module that (by way of others) imports itself. Lazy imports count as well."""
    graph = {
        name: {i.module for i in found if i.module in MODULES and i.module != name} for name, found in IMPORTS.items()
    }
    done: set[str] = set()

    def walk(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, f"a circle: {' -> '.join((*way[way.index(name) :], name))}"
        if name not in done:
            for child in sorted(graph[name]):
                walk(child, (*way, name))
            done.add(name)

    for name in sorted(graph):
        walk(name, ())


@pytest.mark.parametrize("module", [name for name in MODULES if room(name) in LIGHT])
def test_light_modules_import_no_jax(module: str) -> None:
    closure = eager_closure(module)
    heavy = {name: closure[name] for name in closure if name.partition(".")[0] in ("jax", "jaxlib", "flax", "optax")}
    assert not heavy


def test_presets_import_no_jax() -> None:
    assert "jax" not in eager_closure("t5x_like.models.presets")


@pytest.mark.parametrize("module", ["t5x_like.trainer", "t5x_like.evaluation.command", "t5x_like.decoding.command"])
def test_training_on_prepared_data_never_imports_tensorflow(module: str) -> None:
    closure = eager_closure(module)
    assert "t5x_like.data.store" in closure, "the closure has lost its way"
    assert not {name: closure[name] for name in closure if name.partition(".")[0] in TENSORFLOW}


def test_tensorflow_only_at_the_edges_of_data() -> None:
    found = {name for name, seen in IMPORTS.items() for i in seen if i.module.partition(".")[0] in TENSORFLOW}
    assert {room(name) for name in found} <= {"data"}
    light = eager_closure("t5x_like.data.stream").keys() | eager_closure("t5x_like.data.prefetch").keys()
    assert not found & light
