"""The layers of the package: imports go down only, form no cycle, and respect the limits of each package."""

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

# From the bottom to the top. A package imports packages of lower layers only, and none of its own layer.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("utils", "faults"),
    ("hardware", "plugins", "storage"),
    ("config", "kernels"),
    ("monitoring", "sharding", "run_directory"),
    ("distributed", "model_output"),
    ("data", "models", "training", "checkpoints"),
    ("adapters",),
    ("program",),
    ("interop", "planning"),
    ("model_loading",),
    ("decoding", "text_inputs", "finetuning"),
    ("evaluation", "embedding", "launching", "serving"),
    ("export", "reports", "diagnosis"),
    ("trainer", "studies"),
    ("api", "cli"),
    ("__main__",),
)

LIGHT = ("", "errors", "faults", "plugins", "config", "cli", "data", "launching", "storage")
"""Packages that are imported without jax."""

# Modules that a package must not import, by prefix.
FORBIDDEN: dict[str, tuple[str, ...]] = {
    "data": ("jax", "flax", "optax", "orbax"),
    "models": ("jax.sharding", "jax.experimental.mesh_utils", "optax", "orbax", "t5x_like.training", "t5x_like.data"),
    "kernels": ("t5x_like.models", "t5x_like.config", "flax", "optax"),
    "sharding": ("t5x_like.models", "t5x_like.data", "flax", "optax", "orbax"),
    "distributed": ("t5x_like.models", "t5x_like.data", "flax", "optax", "orbax"),
    "training": ("orbax", "t5x_like.data", "t5x_like.cli"),
    "checkpoints": ("t5x_like.models", "t5x_like.trainer", "flax", "optax"),
    "monitoring": ("jax", "flax"),
    "reports": ("jax", "flax", "optax", "orbax"),
    "launching": ("jax", "flax", "optax", "orbax", "numpy"),
    "run_directory": ("jax",),
    "plugins": ("jax", "numpy", "pydantic"),
    "cli": ("flax", "optax", "orbax"),
}
# The only libraries beside the standard library that a package may import.
ONLY_LIBRARIES: dict[str, tuple[str, ...]] = {
    "config": ("pydantic", "pydantic_core", "tyro"),
    "errors": ("pydantic", "pydantic_core"),
    "kernels": ("jax", "numpy", "qwix"),
}
# The only modules of another package that a package may import: models name logical axes and host memory, ask for the
# attention of the devices, and read nothing else of sharding; the training step needs the metric tree of monitoring.
ONLY_MODULES: dict[tuple[str, str], tuple[str, ...]] = {
    ("models", "sharding"): (
        "t5x_like.sharding.attention_choice",
        "t5x_like.sharding.constrain",
        "t5x_like.sharding.host_memory",
    ),
    ("training", "monitoring"): ("t5x_like.monitoring.metrics",),
}


@dataclasses.dataclass(frozen=True)
class Import:
    module: str
    """The imported module, or the package where the statement names an attribute of one."""
    line: int
    eager: bool
    """True if importing the module executes the statement."""


def module_name(path: Path) -> str:
    parts = ("t5x_like", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(ROOT.rglob("*.py")) if "_configs" not in path.parts}


def imports(path: Path) -> list[Import]:
    """Return every import statement of a module, those inside functions included."""

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


def package_of(module: str) -> str:
    """Return the top-level package, or module, below `t5x_like`; an empty string for `t5x_like` itself."""
    return module.split(".")[1] if "." in module else ""


def under(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(f"{prefix}.")


def eager_closure(start: str) -> dict[str, str]:
    """Return each module that importing `start` executes, and the module of this package that imports it."""
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


def test_every_package_has_one_layer() -> None:
    listed = [name for layer in LAYERS for name in layer]
    assert sorted({package_of(module) for module in MODULES} - {""}) == sorted(listed)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module: str) -> None:
    layer_of = {name: layer for layer, names in enumerate(LAYERS) for name in names}
    own = package_of(module)
    for found in IMPORTS[module]:
        other = package_of(found.module) if under(found.module, "t5x_like") else ""
        if not other or other == own:
            continue
        where = f"{MODULES[module]}:{found.line} imports {found.module}"
        if not own:
            # The Python API is imported when one of its names is used; type checkers see it earlier.
            assert other == "api" and not found.eager, f"{where}: importing the package must stay light"
            continue
        assert layer_of[other] < layer_of[own], f"{where}: {other} is not in a layer below {own}"
        allowed = ONLY_MODULES.get((own, other))
        assert allowed is None or found.module in allowed, f"{where}: {own} may import only {allowed} of {other}"


@pytest.mark.parametrize("module", MODULES)
def test_packages_respect_their_limits(module: str) -> None:
    own = package_of(module)
    for found in IMPORTS[module]:
        where = f"{MODULES[module]}:{found.line} imports {found.module}"
        if not under(found.module, f"t5x_like.{own}"):
            assert not any(under(found.module, prefix) for prefix in FORBIDDEN.get(own, ())), where
        top = found.module.partition(".")[0]
        assert top not in ("transformers", "pickle", "cloudpickle", "dill", "joblib"), where
        # torch is imported only to read a file that torch wrote.
        assert top != "torch" or (module == "t5x_like.interop.torch_file" and not found.eager), where
        if own in ONLY_LIBRARIES and not under(found.module, f"t5x_like.{own}"):
            assert top in ("t5x_like", *sys.stdlib_module_names) or top in ONLY_LIBRARIES[own], where
        # An extra, which only runs with products of 8 bits need.
        assert top != "qwix" or not found.eager, where


def test_no_import_cycles() -> None:
    """No module imports itself by way of others. Imports inside functions count as well."""
    graph = {
        name: {i.module for i in found if i.module in MODULES and i.module != name} for name, found in IMPORTS.items()
    }
    graph["t5x_like"].remove("t5x_like.api")  # Not an import at run time: only type checkers see it.
    done: set[str] = set()

    def walk(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, f"a cycle: {' -> '.join((*way[way.index(name) :], name))}"
        if name not in done:
            for child in sorted(graph[name]):
                walk(child, (*way, name))
            done.add(name)

    for name in sorted(graph):
        walk(name, ())


@pytest.mark.parametrize("module", [name for name in MODULES if package_of(name) in LIGHT])
def test_light_modules_import_no_jax(module: str) -> None:
    closure = eager_closure(module)
    heavy = {name: closure[name] for name in closure if name.partition(".")[0] in ("jax", "jaxlib", "flax", "optax")}
    assert not heavy


def test_presets_import_no_jax() -> None:
    assert "jax" not in eager_closure("t5x_like.models.presets")


@pytest.mark.parametrize(
    "module", ["t5x_like.trainer.train", "t5x_like.evaluation.evaluate_runs", "t5x_like.decoding.generate_files"]
)
def test_training_on_prepared_data_never_imports_tensorflow(module: str) -> None:
    closure = eager_closure(module)
    assert "t5x_like.data.store.token_store" in closure, "the closure is incomplete"
    assert not {name: closure[name] for name in closure if name.partition(".")[0] in TENSORFLOW}


def test_tensorflow_only_at_the_edges_of_data() -> None:
    found = {name for name, seen in IMPORTS.items() for i in seen if i.module.partition(".")[0] in TENSORFLOW}
    assert {package_of(name) for name in found} <= {"data"}
    light = (
        eager_closure("t5x_like.data.stream.row_stream").keys() | eager_closure("t5x_like.data.stream.prefetch").keys()
    )
    assert not found & light
