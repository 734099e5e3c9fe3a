"""What a user's `pip install` gets: with a compiler, without one, and what the wheel holds."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A copy of the tracked files: a build must not see what an earlier one left in the checkout."""
    folder = tmp_path_factory.mktemp("sources")
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def build(sources, out, **variables):
    """`pip wheel` as an installer runs it, in this environment; returns (completed process, wheel or None)."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "-w", str(out), str(sources)],
        capture_output=True,
        text=True,
        env={**os.environ, **variables},
    )
    wheels = list(out.glob("*.whl"))
    return done, wheels[0] if wheels else None


def run_one_op(site, *expressions, **variables):
    code = (
        "import torch, flowseg_kernels as fk; book = fk.Codebook(fk.kronecker_centroids(9)); "
        "y = torch.randint(0, 9, (1, 8, 8)); assert torch.equal(book.decode(book.encode(y)), y); "
        + "; ".join(f"print({e})" for e in expressions)
    )
    environment = {**os.environ, "PYTHONPATH": str(site), **variables}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=site)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def unpack(wheel, folder):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
        return archive.namelist()


def no_compiler(tmp_path):
    """A PATH with the build tools but no C++ compiler."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("ninja", "git", "sh"):
        found = shutil.which(name)
        if found:
            (tools / name).symlink_to(found)
    return {"PATH": str(tools), "CXX": ""}


def test_without_a_compiler_the_wheel_is_pure_and_runs(sources, tmp_path):
    done, wheel = build(sources, tmp_path / "out", **no_compiler(tmp_path))
    assert done.returncode == 0, done.stdout[-2000:]
    assert "C++ kernels left out: no C++ compiler was found" in done.stdout + done.stderr
    names = unpack(wheel, tmp_path / "site")
    assert not [n for n in names if n.endswith(".so")]
    backends, reason = run_one_op(
        tmp_path / "site",
        "fk.available_backends('flow_loss')",
        "__import__('flowseg_kernels.info').info.report()[:0] or "
        "__import__('flowseg_kernels.runtime.extension').runtime.extension.why_no_cpu_kernels()",
    )
    assert backends == "['reference']" and "were not compiled" in reason


def test_kernels_of_an_earlier_build_are_not_packed(sources, tmp_path):
    folder = tmp_path / "a folder with spaces"
    shutil.copytree(sources, folder)
    library = folder / "flowseg_kernels" / "lib" / "libflowseg_cpu.so"
    library.write_bytes(b"stale")
    for variables in ({"FLOWSEG_BUILD": "none"}, no_compiler(tmp_path)):
        out = tmp_path / f"out{len(variables)}"
        _, wheel = build(folder, out, **variables)
        assert wheel.name.endswith("-py3-none-any.whl")
        assert not [n for n in zipfile.ZipFile(wheel).namelist() if n.endswith(".so")]


def test_a_torch_that_does_not_import_leaves_the_kernels_out(sources, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart is missing')")
    done, wheel = build(sources, tmp_path / "out", PYTHONPATH=str(tmp_path))
    assert wheel is not None, done.stdout[-2000:]
    assert "left out: torch does not import here (ImportError: libcudart is missing)" in done.stdout + done.stderr


def test_asking_for_kernels_without_a_compiler_is_an_error(sources, tmp_path):
    done, wheel = build(sources, tmp_path / "out", FLOWSEG_BUILD="cpu", **no_compiler(tmp_path))
    assert done.returncode and wheel is None
    assert "FLOWSEG_BUILD=cpu: no C++ compiler was found" in done.stdout + done.stderr


def test_an_unknown_build_mode_says_what_is_wrong(sources, tmp_path):
    done, wheel = build(sources, tmp_path / "out", FLOWSEG_BUILD="gpu")
    assert done.returncode and wheel is None
    assert "wanted auto, cpu, cuda or none; got 'gpu'" in done.stdout + done.stderr


def test_asking_for_cuda_kernels_without_a_compiler_is_an_error(sources, tmp_path):
    done, wheel = build(sources, tmp_path / "out", FLOWSEG_BUILD="cuda", **no_compiler(tmp_path))
    assert done.returncode and wheel is None
    assert "FLOWSEG_BUILD=cuda: no C++ compiler was found" in done.stdout + done.stderr


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
@pytest.mark.parametrize("entry, words", [("9.0", ""), ("newest", "TORCH_CUDA_ARCH_LIST: wanted entries such as 9.0")])
def test_architectures_to_compile_for(monkeypatch, tmp_path, entry, words):
    code = "import sys; sys.argv = ['setup.py', '--name']; import setup; print(setup.code_flags(setup.find_nvcc()))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "TORCH_CUDA_ARCH_LIST": entry},
    )
    assert words in done.stderr and (bool(words) or done.stdout.endswith("-gencode=arch=compute_90,code=sm_90\n"))


def test_nothing_compiled_on_request_gives_a_wheel_for_every_platform(sources, tmp_path):
    _, wheel = build(sources, tmp_path / "out", FLOWSEG_BUILD="none")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = unpack(wheel, tmp_path / "site")
    tops = {n.split("/")[0] for n in names if ".dist-info" not in n}
    assert tops == {"flowseg", "flowseg_kernels"}


@pytest.mark.skipif(not shutil.which("g++") and not shutil.which("clang++"), reason="no C++ compiler")
def test_sdist_to_wheel_in_a_path_with_spaces_runs_the_kernels_and_needs_no_python_abi(sources, tmp_path):
    folder = tmp_path / "a folder"
    shutil.copytree(sources, folder)
    made = subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path / "sdist")],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    (archive,) = (tmp_path / "sdist").glob("*.tar.gz")
    assert made.returncode == 0
    shutil.unpack_archive(archive, tmp_path / "from sdist")
    (unpacked,) = (tmp_path / "from sdist").iterdir()
    done, wheel = build(unpacked, tmp_path / "out", FLOWSEG_BUILD="cpu")
    assert done.returncode == 0, done.stdout[-3000:]
    assert "-py3-none-linux" in wheel.name
    site = tmp_path / "site"
    unpack(wheel, site)
    assert run_one_op(site, "fk.available_backends('flow_loss')[0]") == ["cpu"]
    facts = json.loads((site / "flowseg_kernels/lib/libflowseg_cpu.json").read_text())
    assert facts["torch_target"] == "2.10" and facts["compiler"] and facts["torch"]
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", str(site / "flowseg_kernels/lib/libflowseg_cpu.so")],
        capture_output=True,
        text=True,
    ).stdout
    undefined = [line.split()[-1] for line in symbols.splitlines()]
    assert undefined and not [s for s in undefined if s.startswith(("Py", "_Py"))], "the library needs Python"
    # Everything it takes from torch is the C shim of the stable ABI, none of it C++ of c10, at or torch.
    assert not [s for s in undefined if "c10" in s or "2at" in s or "5torch" in s]
