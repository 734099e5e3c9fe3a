"""README and docs/ are correct: examples run, commands parse, links exist, all names and settings are listed."""

import ast
import contextlib
import doctest
import importlib
import inspect
import io
import pathlib
import pkgutil
import re
import shlex
import subprocess
import sys

import pytest
import torch
import typer

import flowseg
import flowseg_kernels as fk
from bench.__main__ import COMMANDS as BENCH_COMMANDS

ROOT = pathlib.Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
SOURCES = [
    path
    for folder in ("flowseg", "flowseg_kernels", "csrc", "bench", "tests", "build_backend")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh", ".json") and path != pathlib.Path(__file__).resolve()
] + [ROOT / "setup.py"]


def name_of(page):
    return str(page.relative_to(ROOT))


def blocks(page, *languages):
    """(line, text) of the fenced blocks in `languages`."""
    text = page.read_text()
    return [(text[: m.start(2)].count("\n"), m[2]) for m in FENCE.finditer(text) if m[1] in languages]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=name_of)
def test_python_of_a_page_runs_from_top_to_bottom(page, monkeypatch, tmp_path):
    if "define_op(" in page.read_text():
        # Use a new process: the page registers an op, and other tests iterate over all ops.
        code = "\n".join(text for _, text in blocks(page, "python"))
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        return
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for line, code in blocks(page, "python"):
        if ">>>" not in code:
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile("\n" * line + code, page, "exec"), names)
            continue
        session = doctest.DocTestParser().get_doctest(code, names, page.name, str(page), line)
        report = io.StringIO()
        runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
        failed = runner.run(session, out=report.write, clear_globs=False).failed
        names |= session.globs
        assert not failed, report.getvalue()


def test_the_example_of_the_readme_is_ten_lines():
    ((_, example),) = blocks(ROOT / "README.md", "python")
    assert len([line for line in example.splitlines() if line.strip()]) == 10


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_exist(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which does not exist"


def commands(page):
    """Shell commands of a page: lines of shell blocks, with continued lines joined, and commands in backticks."""
    for _, block in blocks(page, "", "sh"):
        yield from (line for line in block.replace("\\\n", " ").splitlines() if line.strip())
    text = FENCE.sub("", page.read_text())
    yield from re.findall(r"`((?:flowseg [a-z]|make |python -m |FLOWSEG_\w+=\S+ )[^`]+)`", text)


def check_flowseg(words):
    """Parse a `flowseg` command without running it, including its --set and --config."""
    from flowseg.cli import app
    from flowseg.config import load_config

    group = typer.main.get_command(app)
    context = group.make_context("flowseg", list(words[:1]), resilient_parsing=True)
    _, command, _ = group.resolve_command(context, list(words[:1]))
    if not words[1:]:
        return
    # A single capital letter such as N is a placeholder for a number.
    given = ["1" if re.fullmatch(r"[A-Z]", w) else w for w in words[1:]]
    with command.make_context(words[0], given, parent=context) as parsed:
        config = parsed.params.get("config")
        # A file of class names is read at once, but the files of a page's reader are not here.
        sets = [
            re.sub(r"^data\.classes=\S+\.txt$", "data.classes=[a, b]", pair) for pair in parsed.params.get("sets", [])
        ]
        load_config(ROOT / config if config else None, sets)


@pytest.mark.parametrize("page", [p for p in PAGES if any(commands(p))], ids=name_of)
def test_commands_of_a_page_exist(page):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in commands(page):
        words = [w for w in shlex.split(line, comments=True) if w != "..."]
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if not words:
            continue
        if words[0].endswith("python"):
            if words[1:2] == ["-m"] and words[2].split(".")[0] in ("flowseg", "flowseg_kernels", "bench", "tests"):
                assert importlib.util.find_spec(words[2]), f"{line}: no such module"
                if words[2] == "bench":
                    assert words[3] in (*BENCH_COMMANDS, "--help"), f"{line}: no such command of bench"
            elif words[1:2] == ["-c"]:
                ast.parse(words[2])
        elif words[0] == "make":
            unknown = [w for w in words[1:] if "=" not in w and w not in targets]
            assert not unknown, f"{line}: the Makefile has no {unknown}"
        elif "flowseg" in words[0:4] and words[0] in ("flowseg", "accelerate", ".venv/bin/flowseg"):
            try:
                check_flowseg(words[words.index("flowseg") + 1 :] if "flowseg" in words else words[1:])
            except typer.Exit:
                continue  # --help
            except Exception as error:
                pytest.fail(f"{name_of(page)}: {line}: {error!r}")
        elif words[0] == "pytest":
            missing = [w for w in words[1:] if "/" in w and not w.startswith("-") and not (ROOT / w).exists()]
            assert not missing, f"{line}: {missing} does not exist"


def test_docs_list_exactly_the_environment_variables_that_the_code_reads():
    read = set()
    for path in SOURCES:
        read |= set(re.findall(r"""["'](FLOWSEG_[A-Z_]+)["']""", path.read_text()))
    listed = set(re.findall(r"^\|[^|]*?(FLOWSEG_[A-Z_]+)", (DOCS / "environment.md").read_text(), re.MULTILINE))
    more = re.findall(r"^\| (`FLOWSEG.*?) \|", (DOCS / "environment.md").read_text(), re.MULTILINE)
    listed |= {name for cell in more for name in re.findall(r"FLOWSEG_[A-Z_]+", cell)}
    assert listed == read


def test_messages_quoted_in_troubleshooting_are_in_the_code():
    code = re.sub(r"\"\s*\n\s*f?\"", "", "\n".join(path.read_text() for path in SOURCES))
    quoted = blocks(DOCS / "troubleshooting.md", "text")
    assert len(quoted) >= 5
    for _, block in quoted:
        for piece in re.split(r"\s*(?:…|\n)\s*", block.strip()):
            assert piece in code, f"no source contains this message: {piece}"


def public_names():
    """(module, name, object) of every name in an `__all__` of flowseg_kernels and flowseg."""
    for name in fk.__all__:
        yield "flowseg_kernels", name, getattr(fk, name)
    for package in ["flowseg", *(f"flowseg.{m.name}" for m in pkgutil.iter_modules(flowseg.__path__) if m.ispkg)]:
        module = importlib.import_module(package)
        for name in getattr(module, "__all__", ()):
            yield package, name, getattr(module, name)


PUBLIC = list(public_names())


@pytest.mark.parametrize("module, name, thing", PUBLIC, ids=[f"{m}.{n}" for m, n, _ in PUBLIC])
def test_public_names_are_documented(module, name, thing):
    reference = "".join(path.read_text() for path in (DOCS / "api").glob("*.md"))
    assert re.search(rf":: {re.escape(module)}\.{name}$|automodule:: {re.escape(module)}$", reference, re.MULTILINE), (
        f"docs/api/ has no entry for {module}.{name}"
    )
    if not callable(thing):
        return
    text = inspect.getdoc(thing) or ""
    assert text.split("\n")[0].rstrip().endswith((".", "]")) or ":" in text.split("\n")[0], f"{name}: {text[:80]!r}"
    if not inspect.isfunction(thing):
        return
    lines = re.findall(r"^ {4}(\w[\w, ]*?)(?: \([^)]*\))?:", text, re.MULTILINE)
    # Functions of flowseg_kernels have one line per argument; functions of flowseg mention each argument.
    described = set(re.findall(r"\w+", " ".join(lines) if module == "flowseg_kernels" else text))
    # A function of one argument may leave out its line.
    parameters = set(inspect.signature(thing).parameters)
    if len(parameters) > 1:
        assert parameters <= described, f"{name}: no line for {sorted(parameters - described)}"
    takes_tensor = torch.Tensor.__name__ in str(inspect.signature(thing))
    if module == "flowseg_kernels" and takes_tensor:
        assert "Returns:" in text and "Raises:" in text and re.search(r"\((B|K), ", text), (
            f"{name}: shapes, returns, raises"
        )


def test_the_command_names_the_missing_extra():
    code = "import sys; sys.modules['typer'] = None; import flowseg.__main__ as m; m.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "pip install '.[train]'" in done.stderr
