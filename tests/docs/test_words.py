"""Identifiers and file names use the field's terms. The lists hold the names that this project used in their place."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(
    path for folder in ("kernels", "mixtral_triton", "benchmarks", "tests") for path in (ROOT / folder).rglob("*.py")
)

# Forbidden as a whole identifier, with or without leading underscores.
NAMES = """
    agreed asked asked_for await_earlier begun by_place chain chained choices choosing chosen door few FEW follows Form
    given instead joined letters made noted of_first offers one_by_one others own own_way planted put_together rivals
    seen settled shell SOME spoil spoilt stranger summed surroundings taken_apart told tried trim Truth twin
    Watch way ways WHOLE whole_text widen with_moved Yardstick
"""
# Forbidden as a part of an identifier or of a file name.
PARTS = """
    asked begun card cards chosen door given noted planted rivals shell spoil spoilt stranger surroundings told truth
    twin way ways yardstick
"""


def definitions(tree: ast.AST) -> Iterator[str]:
    """Every name that a file defines: functions, classes, arguments, variables and attributes."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.alias) and node.asname:
            yield node.asname


def forbidden(name: str) -> bool:
    return name.strip("_") in NAMES.split() or not set(PARTS.split()).isdisjoint(name.lower().split("_"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_identifiers_use_the_terms_of_the_field(path: Path) -> None:
    names = set(definitions(ast.parse(path.read_text()))) | {path.stem}
    assert not sorted(filter(forbidden, names))


def test_a_forbidden_identifier_is_detected() -> None:
    names = definitions(ast.parse("def f(given):\n    self.own_way = card = 1\n    class Yardstick: pass"))
    assert sorted(filter(forbidden, names)) == ["Yardstick", "card", "given", "own_way"]
    assert not forbidden("ownership") and not forbidden("discard")
