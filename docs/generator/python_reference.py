"""The page of the Python API, made from signatures and docstrings.

The source is parsed and not imported, because the environment of the site has neither jax nor NumPy.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from config_reference import table_text

PACKAGE = Path(__file__).resolve().parents[2] / "t5x_like"
WIDTH = 96
INTRODUCTION = """# Python reference

The functions and classes that programs and plug-ins use, with their docstrings. [Python API](../python.md) has examples
of the first ones, [Plug-ins](../plugins.md) and [Extend the package](../extend.md) of the extension points, and
[Configuration](configuration.md) lists the configuration classes.

This page is made from the source when the site is built.
"""
SECTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    # Heading -> module -> names.
    "Load and train": {"api": ("load", "train", "PretrainedModel")},
    "Settings of generation": {
        "decoding/generation_config": ("GenerationConfig",),
        "decoding/sampling": ("Sampling",),
        "decoding/unmasking_schedule": ("DiffusionSampling",),
        "decoding/log_likelihood": ("Score",),
    },
    "Recipes": {
        "config/dataclass": ("config_dataclass",),
        "config/recipes": ("load_recipe",),
        "config/validation/__init__": ("validate",),
        "config/mixtures": ("ul2", "ul2r", "t5", "t5gemma2", "bert", "roberta", "span_bert", "gpt_bert", "bart", "glm")
        + ("cm3", "fim"),
        "config/initialization": (
            "decoder_to_encoder_decoder",
            "decoder_to_encoder",
            "encoder_decoder_to_encoder",
        ),
        "config/width_transfer": ("width_transfer",),
    },
    "Data": {
        "data/store/prepare": ("prepare", "open_stores"),
        "data/stream/row_stream": ("TrainingStream",),
        "data/seqio_/register_mixtures": ("register_mixture",),
        "data/grain": ("StepSource", "RowSource", "map_dataset"),
    },
    "The train step by hand": {
        "program": ("build_program", "Program"),
        "monitoring/metrics": ("WeightedMean", "compute"),
    },
    "Extension points": {
        "config/objectives/base": ("ObjectiveConfig", "ExampleLengths"),
        "data/objectives/base": ("ObjectiveImplementation",),
        "data/objectives/examples": ("Examples",),
        "config/objectives/registry": ("register_objective",),
        "config/optimizers": ("OptimizerConfig", "register_optimizer", "register_optax_factory"),
        "training/optimizers/optax_optimizer": ("with_learning_rate",),
        "kernels/attention_backend": ("AttentionBackend", "AttentionRequest", "AttentionOptions"),
        "kernels/attention": ("register_backend",),
        "interop/huggingface/families/family": ("Family",),
        "interop/huggingface/families/__init__": ("register_family",),
        "evaluation/text_metrics": ("register_metric",),
        "monitoring/writers": ("Writer", "register_writer"),
        "trainer/callbacks": ("Callback", "register_callback"),
        "data/sources/generators": ("register_corpus",),
    },
    "Errors": {"errors": ("UserError", "ConfigError", "ConfigProblem", "DataError", "SafetyError")},
}
Definition = ast.FunctionDef | ast.ClassDef


def page() -> str:
    """Return the page as Markdown."""
    parts = [INTRODUCTION]
    for heading, modules in SECTIONS.items():
        parts.append(f"## {heading}")
        for module, names in modules.items():
            for definition in definitions(module, names):
                parts += _described(public_module(module, definition.name), definition)
    return "\n\n".join(part for part in parts if part) + "\n"


def definitions(module: str, names: Sequence[str]) -> list[Definition]:
    """Return the definitions of some names of a module, in the order of the names.

    Raises:
      LookupError: the module does not define a name.
    """
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    found = {node.name: node for node in tree.body if isinstance(node, Definition)}
    missing = [name for name in names if name not in found]
    if missing:
        raise LookupError(f"t5x_like/{module}.py: found no {', '.join(missing)}, expected what python_reference lists")
    return [found[name] for name in names]


def public_methods(definition: ast.ClassDef) -> list[ast.FunctionDef]:
    """Return the methods that users of a class call or override."""
    methods = [node for node in definition.body if isinstance(node, ast.FunctionDef)]
    return [method for method in methods if not method.name.startswith("_")]


def fields(definition: ast.ClassDef) -> dict[str, tuple[str, str]]:
    """Return the annotated fields of a class: name -> (type, string below it)."""
    found = {}
    for node, following in zip(definition.body, [*definition.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id[0] != "_":
            is_text = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            text = following.value.value if is_text and isinstance(following.value.value, str) else ""
            found[node.target.id] = (ast.unparse(node.annotation), text)
    return found


def public_module(module: str, name: str) -> str:
    """Return the module that users import a name from: the outermost package whose `__init__.py` imports it."""
    path = PurePosixPath(module)
    for package in [*reversed(path.parents)]:
        file = PACKAGE / package / "__init__.py"
        imports = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
        if name in {alias.name for node in imports for alias in node.names}:
            path = package
            break
    return ".".join(["t5x_like", *(part for part in path.parts if part != "__init__")])


def _described(module: str, definition: Definition) -> Iterator[str]:
    yield f"### {definition.name}"
    yield f"```python\nfrom {module} import {definition.name}\n```"
    if isinstance(definition, ast.FunctionDef):
        yield f"```python\n{signature(definition)}\n```"
        yield markdown(ast.get_docstring(definition) or "")
        return
    constructor = next((node for node in definition.body if getattr(node, "name", "") == "__init__"), None)
    yield markdown(ast.get_docstring(definition) or "")
    if isinstance(constructor, ast.FunctionDef):
        yield f"```python\n{signature(constructor, name=definition.name)}\n```"
        yield markdown(ast.get_docstring(constructor) or "")
    described = ast.get_docstring(definition) or ""
    lines = [
        f"- `{name}`: `{kind}`{'. ' if text else ''}{table_text(text)}"
        for name, (kind, text) in fields(definition).items()
        if not re.search(rf"^ +(\w+, )*{name}(, \w+)*:", described, re.M)
    ]
    if lines:
        yield "**Fields**"
        yield "\n".join(lines)
    for method in public_methods(definition):
        is_property = any("property" in ast.unparse(decorator) for decorator in method.decorator_list)
        if is_property:
            returns = f": `{ast.unparse(method.returns)}`" if method.returns else ""
            yield f"**`{definition.name}.{method.name}`**{returns}"
        else:
            yield f"```python\n{signature(method, name=f'{definition.name}.{method.name}')}\n```"
        yield markdown(ast.get_docstring(method) or "")


def signature(function: ast.FunctionDef, name: str | None = None) -> str:
    """Return the call of a function with its parameters, one on a line if they do not fit one line."""
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults))
    parameters = [_parameter(*pair) for pair in zip(positional, [*defaults, *arguments.defaults], strict=True)]
    if name is not None and parameters and parameters[0] in ("self", "cls"):
        del parameters[0]
    if arguments.vararg:
        parameters.append(f"*{_parameter(arguments.vararg, None)}")
    elif arguments.kwonlyargs:
        parameters.append("*")
    parameters += [_parameter(*pair) for pair in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    if arguments.kwarg:
        parameters.append(f"**{_parameter(arguments.kwarg, None)}")
    returns = f" -> {ast.unparse(function.returns)}" if function.returns and function.name != "__init__" else ""
    called = name or function.name
    line = f"{called}({', '.join(parameters)}){returns}"
    if len(line) <= WIDTH:
        return line
    return "\n".join([f"{called}(", *(f"    {parameter}," for parameter in parameters), f"){returns}"])


def _parameter(argument: ast.arg, default: ast.expr | None) -> str:
    annotation = f": {ast.unparse(argument.annotation)}" if argument.annotation else ""
    if default is None:
        return f"{argument.arg}{annotation}"
    equals = " = " if annotation else "="
    return f"{argument.arg}{annotation}{equals}{ast.unparse(default)}"


def markdown(docstring: str) -> str:
    """Return a docstring in Google's style as Markdown: paragraphs, and lists of arguments, results and errors."""
    parts = []
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(docstring)) if docstring else []:
        lines = paragraph.splitlines()
        heading = re.fullmatch(r"(Args|Attributes|Returns|Yields|Raises)( \(.*\))?:", lines[0])
        if heading:
            label = {"Args": "Arguments"}.get(heading[1], heading[1])
            parts.append(f"**{label}**{heading[2] or ''}")
            parts.append(_items(lines[1:], named=heading[1] not in ("Returns", "Yields")))
        elif all(line.startswith("  ") for line in lines) or re.match(r"  \S", lines[-1]):
            # A list or a formula whose lines are indented below its first one.
            first = [line for line in lines if not line.startswith("  ")]
            parts.append(table_text(" ".join(first)) if first else "")
            parts.append(_items([line for line in lines if line.startswith("  ")], named=False))
        else:
            parts.append(table_text(" ".join(lines)))
    return "\n\n".join(part for part in parts if part)


def _items(lines: Sequence[str], *, named: bool) -> str:
    """Return indented lines as a list; a line with more indentation continues the one before it."""
    smallest = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    items: list[str] = []
    for line in lines:
        if len(line) - len(line.lstrip()) > smallest and items:
            items[-1] += f" {line.strip()}"
        else:
            items.append(line.strip())
    if not named:
        # Prose whose lines have the same indentation, unless each of them names a result.
        is_list = len(items) > 1 and all(re.match(r"[\w/<>, -]+: ", item) for item in items)
        return "\n".join(f"- {_item(item)}" for item in items) if is_list else table_text(" ".join(items))
    return "\n".join(f"- {_item(item)}" for item in items)


def _item(item: str) -> str:
    match = re.match(r"([\w*, .]+): (.*)", item, re.S)
    if not match:
        return table_text(item)
    names = ", ".join(f"`{name.strip()}`" for name in match[1].split(","))
    return f"{names}: {table_text(match[2])}"
