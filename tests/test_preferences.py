"""The default GPU backend of each op follows from the stored results, and its reason names them."""

import json

import pytest

from bench import preferences
from flowseg_kernels.runtime.backend import gpu_preference


def stored(folder, entries, op="distance_correction", gpu="Made-up GPU", **more):
    """A results folder: {group: {entry: milliseconds}}."""
    rows = [
        {"group": group, "op": op, "entry": entry, "ms": ms, "commit": "1234abcd9", **more}
        for group, times in entries.items()
        for entry, ms in times.items()
    ]
    folder.mkdir()
    (folder / "op.json").write_text(json.dumps({"machine": {"gpu": gpu} if gpu else {}, "rows": rows}))


def test_the_committed_file_equals_the_output_of_the_command():
    assert json.loads(preferences.FILE.read_text()) == preferences.preferences(), "run python -m bench preferences"
    for op in preferences.OPS:
        order, because = gpu_preference(op)
        assert set(order) == {"cuda", "triton"} and ("no GPU has measured it" in because or "measured on" in because)


def test_triton_goes_first_for_the_field_until_a_gpu_has_timed_both(tmp_path):
    assert preferences.preferences(tmp_path)["neural_field"]["order"] == ["triton", "cuda"]
    stored(tmp_path / "gpu", {"a": {"ours (cuda)": 1.0, "ours (triton)": 4.0}}, op="neural_field forward", gpu="A GPU")
    found = preferences.preferences(tmp_path)["neural_field"]
    assert found["order"] == ["cuda", "triton"] and found["because"].startswith("measured on A GPU")


def test_measured_times_decide(tmp_path):
    both = {"a": {"ours (cuda)": 4.0, "ours (triton)": 1.0}, "b": {"ours (cuda)": 1.0, "ours (triton)": 1.0}}
    stored(tmp_path / "gpu", both)
    found = preferences.preferences(tmp_path)
    assert found["distance_correction"]["order"] == ["triton", "cuda"]
    assert found["distance_correction"]["because"] == (
        "measured on Made-up GPU at 1234abcd9: Triton takes 0.50 of the time of CUDA C++, the geometric mean of 2 workloads"
    )
    # The other ops have no measurement.
    assert found["nearest_centroid"] == preferences.static("nearest_centroid")


@pytest.mark.parametrize("triton, first", [(0.95, "cuda"), (0.85, "triton"), (1.05, "cuda")])
def test_a_measured_lead_of_triton_of_less_than_a_tenth_is_a_tie(tmp_path, triton, first):
    stored(tmp_path / "a", {"a": {"ours (cuda)": 1.0, "ours (triton)": triton}})
    found = preferences.preferences(tmp_path)["distance_correction"]
    assert found["order"][0] == first
    assert ("a tie, and CUDA C++ compiles nothing at the first call" in found["because"]) == (triton == 0.95)


def test_the_reason_says_when_times_come_from_several_runs(tmp_path):
    stored(tmp_path / "a", {"a": {"ours (cuda)": 1.0, "ours (triton)": 3.0}})
    path = tmp_path / "a" / "op.json"
    result = json.loads(path.read_text())
    result["rows"][1]["commit"] = "f" * 9
    path.write_text(json.dumps(result))
    assert ", from several runs" in preferences.preferences(tmp_path)["distance_correction"]["because"]


@pytest.mark.parametrize(
    "entries, gpu",
    [
        ({"a": {"ours (cuda)": 4.0}, "b": {"ours (triton)": 1.0}}, "Made-up GPU"),
        ({"a": {"ours (cuda)": 4.0, "ours (triton)": 1.0}}, None),
        ({"a": {"ours": 4.0, "eager": 9.0}}, "Made-up GPU"),
    ],
)
def test_times_of_one_backend_or_of_a_cpu_decide_nothing(tmp_path, entries, gpu):
    stored(tmp_path / "here", entries, gpu=gpu)
    assert preferences.preferences(tmp_path)["distance_correction"] == preferences.static("distance_correction")


@pytest.mark.parametrize(
    "listed, order", [(20, ["triton", "cuda"]), (10.9, ["cuda", "triton"]), (5, ["cuda", "triton"])]
)
def test_static_counts_decide_unless_they_tie(tmp_path, monkeypatch, listed, order):
    for name in ("budget.json", "triton_budget.json"):
        (tmp_path / name).write_text((preferences.BUDGETS / name).read_text())
    path = tmp_path / "budget.json"
    budget = json.loads(path.read_text())
    budget["instructions"]["decode_by_grid"]["listed candidate"] = listed
    path.write_text(json.dumps(budget))
    monkeypatch.setattr(preferences, "BUDGETS", tmp_path)
    found = preferences.static("nearest_centroid")
    assert found["order"] == order and f"{listed} in CUDA C++" in found["because"]
    assert ("a tie, and CUDA C++ compiles nothing at the first call" in found["because"]) == (listed == 10.9)
