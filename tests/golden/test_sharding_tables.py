"""Shardings of the shipped recipes do not change unseen; `make golden-shardings` writes new tables."""

from __future__ import annotations

import ast

import pytest
from sharding_tables import FOLDER, RECIPES, activations_table, file_of, program_of, state_table

from t5x_like.config.recipes import DEFAULT_FUNCTION, load_recipe, shipped_recipes


@pytest.mark.parametrize("name", RECIPES)
def test_shardings_of_the_state_are_those_of_the_table(name: str) -> None:
    run = load_recipe(name)
    assert state_table(program_of(run)) == file_of(run).read_text().partition("\n\n")[0] + "\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_shardings_of_activations_are_those_of_the_table(name: str) -> None:
    run = load_recipe(name)
    assert activations_table(program_of(run)) == file_of(run).read_text().partition("\n\n")[2]


def test_every_recipe_that_names_a_machine_has_a_table() -> None:
    found = set()
    for path in shipped_recipes():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                name = path.stem if node.name == DEFAULT_FUNCTION else f"{path.stem}:{node.name}"
                if load_recipe(name).partitioning.topology is not None:
                    found.add(name)
    assert found == set(RECIPES)
    assert {file_of(load_recipe(name)) for name in RECIPES} == set(FOLDER.glob("*.txt"))
