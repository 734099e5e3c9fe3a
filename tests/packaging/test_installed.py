"""From the source distribution into an environment with nothing but torch: with a compiler and without one."""

import json
import re
import zipfile

from .environment import ONE_OP, FreshEnvironment, no_compiler


def test_without_compiler_nvcc_and_triton_the_reference_runs(sdist, tmp_path):
    bare = no_compiler(tmp_path)
    fresh = FreshEnvironment(tmp_path / "venv")
    said = fresh.install(sdist, **bare)
    assert "C++ kernels left out: no C++ compiler was found" in said
    assert not list(fresh.site.glob("flowseg_kernels/lib/*.so"))
    assert fresh.run("-c", ONE_OP, **bare) == "reference tensor(True)\n"
    info = fresh.run("-m", "flowseg_kernels.info", **bare)
    assert re.search(
        r"C\+\+ kernels: not loaded: .*were not compiled when .* was installed; with a C\+\+ compiler", info
    )
    assert "FLOWSEG_BUILD=cpu pip install" in info
    assert "Triton kernels: Triton is not installed (pip install triton)" in info
    assert re.search(r"flow_loss +reference\n", info) and "not cpu: the C++ kernels were not compiled" in info


def test_with_a_compiler_the_kernels_run(compiled):
    _, fresh = compiled
    assert fresh.run("-c", ONE_OP) == "cpu tensor(True)\n"
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
    """The training stack has requirements that the kernels have not: without them it says how to get them."""
    _, fresh = compiled
    said = fresh.run("-c", "import subprocess, sys; print(subprocess.run([sys.executable, '-m', 'flowseg'], "
                     "capture_output=True, text=True).stderr)")  # fmt: skip
    assert "error: flowseg needs" in said and ".[train]" in said and "Traceback" not in said
