"""The house keeps its shape: what users wrote down still works, imports point down, functions and sentences stay readable."""

import ast
import json
import pathlib

import pytest

import flowseg_kernels as fk

from . import closure, layers, prose, surface

ROOT = pathlib.Path(__file__).parents[2]
PACKAGES = ("flowseg", "flowseg_kernels")
#: The most lines of code of one function; the docstring does not count.
LONGEST = 80
#: Bounds that only go down.
BAD_OPENINGS = 5
FILES_OF_FLOW_LOSS = 30
#: Triton kernels that may be longer, with the reason.
LONG_KERNELS = {"backward_kernel": "its operands stay on chip across all of its steps"}
#: The most columns of a line of C++ or CUDA; ruff checks Python.
WIDEST = 132
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
    """(file:line name, lines) of functions whose code is longer than LONGEST. Triton kernels of LONG_KERNELS are left out."""
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    continue
                if node.name in LONG_KERNELS:
                    continue
                has_docstring = ast.get_docstring(node, clean=False) is not None and len(node.body) > 1
                lines = node.end_lineno - node.body[1 if has_docstring else 0].lineno + 1
                if lines > LONGEST:
                    yield f"{file.relative_to(ROOT)}:{node.lineno} {node.name}", lines


def test_no_function_is_longer_than_one_screen():
    assert not list(long_functions())


def test_no_line_of_cpp_is_too_wide():
    for file in prose.sources(["csrc", "tests/host_cuda"]):
        if file.suffix != ".py":
            wide = [n for n, line in enumerate(file.read_text().splitlines(), 1) if len(line) > WIDEST]
            assert not wide, f"{file.relative_to(ROOT)}: lines {wide}"


def test_comments_and_docstrings_say_their_subject_first():
    bad = prose.bad_openings(list(prose.FOLDERS))
    assert len(bad) <= BAD_OPENINGS, "\n".join(f"{file}:{line}: {text.splitlines()[0]}" for file, line, text in bad)


def test_flow_loss_on_all_backends_is_few_files():
    files = closure.files_of("flow_loss")
    assert len(files) <= FILES_OF_FLOW_LOSS, "\n".join(str(f.relative_to(ROOT)) for f in files)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_has_a_layer_and_every_layer_its_modules(package):
    modules = layers.imports(package)
    assert not [m for m in modules if layers.entry_of(package, m) is None], "add these modules to tests/house/layers.py"
    used = {layers.entry_of(package, m) for m in modules}
    assert not set().union(*layers.LAYERS[package]) - used, "remove these entries from tests/house/layers.py"


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_to_lower_layers(package):
    upward = []
    for module, targets in layers.imports(package).items():
        own = layers.entry_of(package, module)
        for target in targets:
            entry = layers.entry_of(package, target)
            if entry != own and not layers.rank_of(package, entry) < layers.rank_of(package, own):
                upward.append(f"{module} imports {target}")
    assert not upward


@pytest.mark.parametrize("package", PACKAGES)
def test_modules_do_not_import_each_other_in_a_circle(package):
    assert not layers.circle(layers.imports(package))


def test_the_tests_of_imports_see_a_circle_and_its_way():
    assert layers.circle({"a": {"b"}, "b": {"c", "d"}, "c": set(), "d": {"b"}}) == ["b", "d", "b"]
    assert not layers.circle({"a": {"b", "c"}, "b": {"c"}, "c": set()})


def test_flowseg_uses_the_public_names_of_flowseg_kernels_only():
    for file in sorted((ROOT / "flowseg").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flowseg_kernels"):
                assert node.module == "flowseg_kernels", f"{file}: imports {node.module}"
                assert {a.name for a in node.names} <= set(fk.__all__), f"{file}: imports names that are not public"
            if isinstance(node, ast.Import):
                assert not [a.name for a in node.names if a.name.startswith("flowseg_kernels.")], (
                    f"{file}: {ast.unparse(node)}"
                )


def test_flowseg_kernels_does_not_import_flowseg():
    for file in sorted((ROOT / "flowseg_kernels").rglob("*.py")):
        assert not [target for target in closure.imports_of(file) if target[0] == "flowseg"], file
