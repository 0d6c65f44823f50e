"""The table of planted defects fits the sources; the defects themselves run in scripts/mutants."""

from __future__ import annotations

import ast

import pytest
from run import ROOT, Mutant, load_table


@pytest.mark.parametrize("mutant", load_table(), ids=lambda mutant: mutant.name)
def test_every_defect_can_be_planted(mutant: Mutant) -> None:
    text = (ROOT / mutant.file).read_text(encoding="utf-8")
    planted = mutant.planted(text)
    # Still Python, and another program: a defect in a comment would be killed by nothing.
    assert ast.dump(ast.parse(planted)) != ast.dump(ast.parse(text))
    for test in mutant.tests:
        file, _, function = test.partition("::")
        assert f"def {function or 'test_'}" in (ROOT / file).read_text(encoding="utf-8")


def test_names_are_distinct() -> None:
    names = [mutant.name for mutant in load_table()]
    assert len(names) == len(set(names)) >= 10


@pytest.mark.parametrize(("text", "times"), [("x = 2\n", 0), ("x = 1\nif y:\n    x = 1\n", 2)])
def test_a_line_that_is_not_there_once_is_an_error(text: str, times: int) -> None:
    mutant = Mutant("m", "f.py", "x = 1", "x = 3", ())
    with pytest.raises(ValueError, match=f"holds this line {times} times"):
        mutant.planted(text)
    assert mutant.planted("if y:\n    x = 1  \n    xx = 1\n") == "if y:\n    x = 3  \n    xx = 1\n"
