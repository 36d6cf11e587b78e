"""The code in the READMEs: it parses, and what it imports is there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = ["README.md", "examples/README.md", "tests/benchmarks/README.md"]


def blocks(file, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / file).read_text(), re.DOTALL)


@pytest.mark.parametrize("file", FILES)
def test_code_parses_and_its_imports_from_the_package_are_there(file):
    for block in blocks(file, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("torch_regpen"):
                exec(compile(ast.Module([node], []), file, "exec"), {})


@pytest.mark.parametrize("file", FILES)
def test_commands_name_files_that_exist(file):
    named = re.findall(r"python ((?:examples|tests)/[\w/]+\.py)", (ROOT / file).read_text())
    assert all((ROOT / path).exists() for path in named)
    assert named or file != "README.md"


def test_the_readme_has_at_most_1600_words():
    assert len((ROOT / "README.md").read_text().split()) <= 1600
