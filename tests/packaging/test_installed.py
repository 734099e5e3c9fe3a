"""Installing the source distribution into an environment with only torch, with a compiler and without one."""

import json
import re
import shlex
import shutil
import zipfile

from .environment import ONE_OP, FreshEnvironment, no_compiler


def test_without_compiler_nvcc_and_triton_the_reference_runs(sdist, tmp_path):
    bare = no_compiler(tmp_path)
    fresh = FreshEnvironment(tmp_path / "venv")
    said = fresh.install(sdist, **bare)
    assert "C++ kernels left out: no C++ compiler was found" in said
    assert "INSTALLED WITHOUT ITS C++ KERNELS" in said
    assert not list(fresh.site.glob("flowseg_kernels/lib/*.so"))
    child = "\nimport subprocess, sys; subprocess.run([sys.executable, '-c', 'import flowseg_kernels'])"
    done = fresh.process("-c", ONE_OP + child, **bare)
    assert done.stdout == "reference tensor(True)\n"
    # The command names the archive that was installed: it works without a clone of the project.
    command = (
        rf"{fresh.python} -m pip install 'setuptools>=77' ninja && FLOWSEG_BUILD=cpu {fresh.python} -m pip install "
        rf"--no-build-isolation --no-cache-dir --force-reinstall --no-deps {shlex.quote(str(sdist))}"
    )
    reason = "the C++ kernels were not compiled when flowseg-kernels was installed (no C++ compiler was found"
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("flowseg-kernels: ")]
    assert reason in line and command in line
    info = fresh.run("-m", "flowseg_kernels.info", **bare)
    assert f"C++ kernels: not loaded: {reason}" in info and command in info
    assert "Triton kernels: Triton is not installed (pip install triton)" in info
    assert re.search(r"flow_loss +reference\n", info) and "not cpu: the C++ kernels were not compiled" in info


def test_a_library_that_does_not_load_is_said_at_the_first_op(compiled, tmp_path):
    _, fresh = compiled
    shutil.copytree(fresh.site / "flowseg_kernels", tmp_path / "flowseg_kernels")
    (tmp_path / "flowseg_kernels/lib/libflowseg_cpu.so").write_bytes(b"cut short")
    done = fresh.process("-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + ONE_OP)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("flowseg-kernels: ")]
    assert "the C++ kernels are not used: libflowseg_cpu.so is truncated or is not an ELF shared library" in line


def test_with_a_compiler_the_kernels_run(compiled):
    _, fresh = compiled
    done = fresh.process("-c", ONE_OP)
    assert done.stdout == "cpu tensor(True)\n" and "flowseg-kernels: " not in done.stderr
    info = fresh.run("-m", "flowseg_kernels.info")
    assert re.search(
        r"C\+\+ kernels: loaded; running (baseline|AVX2|AVX-512) code; built with .* stable ABI 2\.10", info
    )
    assert re.search(r"flow_loss +cpu\n", info)


def test_wheel_holds_both_packages_one_library_and_its_record(compiled):
    wheel, fresh = compiled
    assert re.search(r"-py3-none-linux_\w+\.whl$", wheel.name), "one wheel serves every Python of the platform"
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0] for n in names if ".dist-info/" not in n} == {"flowseg", "flowseg_kernels"}
    assert [n for n in names if n.endswith(".so")] == ["flowseg_kernels/lib/libflowseg_cpu.so"]
    assert {n.rpartition(".")[2] for n in names if ".dist-info/" not in n} <= {"py", "json", "so", "gitkeep"}
    assert any(n.endswith(".dist-info/licenses/LICENSE") for n in names)
    facts = json.loads((fresh.site / "flowseg_kernels/lib/libflowseg_cpu.json").read_text())
    assert facts["torch_target"] == "2.10" and facts["compiler"] and facts["torch"]


def test_command_line_of_a_bare_installation_names_what_it_needs(compiled):
    """The training stack has more requirements than the kernels. Without them the command says how to install them."""
    _, fresh = compiled
    said = fresh.run("-c", "import subprocess, sys; print(subprocess.run([sys.executable, '-m', 'flowseg'], "
                     "capture_output=True, text=True).stderr)")  # fmt: skip
    assert "error: flowseg needs" in said and ".[train]" in said and "Traceback" not in said
