"""Shardings of the shipped recipes, compared with golden tables; `make golden-shardings` writes new tables."""

from __future__ import annotations

import ast

import pytest
from helpers.sharding_tables import FOLDER, RECIPES, activations_table, file_of, program_of, state_table

from t5x_like.config.recipes import DEFAULT_FUNCTION, load_recipe, shipped_recipes


@pytest.mark.parametrize("name", RECIPES)
def test_state_shardings_match_the_golden_table(name: str) -> None:
    run = load_recipe(name)
    assert state_table(program_of(run)) == file_of(run).read_text().partition("\n\n")[0] + "\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_activation_shardings_match_the_golden_table(name: str) -> None:
    run = load_recipe(name)
    assert activations_table(program_of(run)) == file_of(run).read_text().partition("\n\n")[2]


def test_every_recipe_with_a_topology_has_a_golden_table() -> None:
    with_topology = set()
    for path in shipped_recipes():
        for node in ast.parse(path.read_text()).body:
            # A recipe with a parameter starts from a model that the user names.
            if isinstance(node, ast.FunctionDef) and not node.args.args and not node.name.startswith("_"):
                name = path.stem if node.name == DEFAULT_FUNCTION else f"{path.stem}:{node.name}"
                if load_recipe(name).sharding.topology is not None:
                    with_topology.add(name)
    assert with_topology == set(RECIPES)
    assert {file_of(load_recipe(name)) for name in RECIPES} == set(FOLDER.glob("*.txt"))
