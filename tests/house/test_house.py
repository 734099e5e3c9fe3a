"""The house keeps its shape: what users wrote down still works, imports point down, functions and sentences stay readable."""

import ast
import json
import pathlib

import pytest

from . import closure, prose, surface

ROOT = pathlib.Path(__file__).parents[2]
PACKAGES = ("flowseg", "flowseg_kernels")
#: The most lines of code of one function; the docstring does not count.
LONGEST = 80
#: Bounds that only go down.
BAD_OPENINGS = 140
FILES_OF_FLOW_LOSS = 61
RECORDED = json.loads(surface.RECORD.read_text())
NOW = surface.surface()


@pytest.mark.parametrize("path", RECORDED["callables"])
def test_a_documented_callable_takes_what_it_took(path):
    assert path in NOW["callables"], f"{path} is gone"
    new = NOW["callables"][path]
    old = [p for p in RECORDED["callables"][path] if "VAR_KEYWORD" not in p]
    assert [p for p in new if p in old] == old, f"{path}: wanted the parameters {old}; got {new}"
    for added in (p for p in new if p not in old):
        assert len(added.split()) > 2 or "VAR_" in added, f"{path}: the new parameter {added} has no default"


def test_the_schemas_of_the_ops_are_as_they_were():
    assert set(RECORDED["op schemas"]) <= set(NOW["op schemas"])


def test_state_dicts_have_the_keys_they_had():
    assert NOW["state-dict keys"] == RECORDED["state-dict keys"]


def test_settings_have_the_names_and_defaults_they_had():
    assert RECORDED["settings"].items() <= NOW["settings"].items()


@pytest.mark.parametrize("command", RECORDED["commands"])
def test_a_command_takes_the_options_it_took(command):
    assert set(RECORDED["commands"][command]) <= set(NOW["commands"][command])


def test_environment_variables_are_still_read():
    assert set(RECORDED["environment"]) <= set(NOW["environment"])


def long_functions():
    """(file:line name, lines) of functions whose code is longer than LONGEST. Triton kernels cannot be split and are left out."""
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    continue
                if any("jit" in ast.unparse(d) for d in node.decorator_list):
                    continue
                has_docstring = ast.get_docstring(node, clean=False) is not None and len(node.body) > 1
                lines = node.end_lineno - node.body[1 if has_docstring else 0].lineno + 1
                if lines > LONGEST:
                    yield f"{file.relative_to(ROOT)}:{node.lineno} {node.name}", lines


def test_no_function_is_longer_than_one_screen():
    assert not list(long_functions())


def test_comments_and_docstrings_say_their_subject_first():
    bad = prose.bad_openings(list(prose.FOLDERS))
    assert len(bad) <= BAD_OPENINGS, "\n".join(f"{file}:{line}: {text.splitlines()[0]}" for file, line, text in bad)


def test_flow_loss_on_all_backends_is_few_files():
    files = closure.files_of("flow_loss")
    assert len(files) <= FILES_OF_FLOW_LOSS, "\n".join(str(f.relative_to(ROOT)) for f in files)
