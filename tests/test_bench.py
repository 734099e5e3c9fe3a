"""The benchmarks run, store, render and judge. These tests judge no time."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

from bench import __main__ as main
from bench import compare, evaluation, report, results, run, targets, vocabulary
from bench.cases.vocabulary import ChunkedHead, head_loss, why_too_large

from .house import closure

ROOT = pathlib.Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "FLOWSEG_BENCH_QUICK": "1", "FLOWSEG_BENCH_DEVICE": "cpu", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The result of `pytest bench` at tiny sizes."""
    pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed; `make install` installs it")
    path = tmp_path_factory.mktemp("quick") / "bench.json"
    command = [sys.executable, "-m", "pytest", "bench", "-p", "no:cacheprovider", f"--benchmark-json={path}"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    return json.loads(path.read_text())


def made_up(ms, group="nearest_centroid ade512", entry="ours", iqr=0.0):
    """A pytest-benchmark result of one entry."""
    item = {
        "group": group,
        "stats": {"median": ms / 1e3, "iqr": iqr / 1e3, "rounds": 5},
        "extra_info": {
            "op": group.split()[0],
            "workload": group.split()[-1],
            "spread": 0.1,
            "entry": entry,
            "pixels": 1,
        },
    }
    machine = {"model": "Some CPU", "threads": 2, "torch": "2.13.0"}
    return {
        "benchmarks": [item],
        "machine_info": machine,
        "commit_info": {"id": "0123456789ab", "dirty": False},
        "datetime": "2026-01-01",
    }


def test_the_short_form_measures_every_op_and_finds_no_wrong_pixel(quick):
    rows = results.rows_of(quick)
    ops = {row["op"] for row in rows}
    groups = {row["group"] for row in rows}
    for op in ("distance_correction", "flow_loss forward+backward", "flow_interpolate"):
        assert {f"{op} {workload}" for workload in ("ade512", "coco512", "many")} <= groups
    assert {"nearest_centroid", "decode_confusion", "training step", "sampling"} <= ops
    assert {"vocabulary training", "vocabulary decoding"} <= ops
    for what in ("forward", "forward+backward"):
        models = {group.split()[2] for group in groups if group.startswith(f"neural_field {what} ")}
        assert models == {"L", "XL"}
    for op in ("distance_correction", "nearest_centroid"):
        assert {f"{op} by {size}" for size in ("classes", "channels", "pixels")} <= ops
    ours = [row for row in rows if report.is_ours(row)]
    assert all(row["ms"] > 0 for row in ours)
    assert all(row["wrong_pixels"] == 0 for row in ours if row["op"].startswith("nearest_centroid"))


def test_results_are_stored_by_machine_and_rendered_with_pictures(quick, tmp_path):
    folder = results.store(quick, tmp_path / "results")
    stored = results.load(folder)
    assert len(stored["rows"]) == len(quick["benchmarks"])
    results.store(quick, tmp_path / "results")
    assert len(results.load(folder)["rows"]) == len(quick["benchmarks"])  # replaced, not repeated
    readme, images = tmp_path / "README.md", tmp_path / "images"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    images.mkdir()
    report.write(readme, tmp_path / "results", images)
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    row = next(
        r for r in stored["rows"] if r["group"].startswith("nearest_centroid ade512 spread 0.1") and report.is_ours(r)
    )
    whole = (tmp_path / "docs" / "results" / "bench.md").read_text()
    assert f"**{row['ms']:.3g}**" in text and f"**{row['ms']:.3g}**" in whole
    assert "nearest_centroid many" in whole and "nearest_centroid many" not in text
    names = {path.name.removeprefix(f"bench-{folder.name}-") for path in images.iterdir()}
    assert {"speedup.png", "roofline.png", "scaling.png"} <= names


def test_comparing_fails_on_a_slow_down_and_when_nothing_is_stored(tmp_path, capsys):
    fresh = tmp_path / "fresh.json"
    fresh.write_text(json.dumps(made_up(1.5)))
    arguments = [str(fresh), "--results", str(tmp_path)]
    assert compare.main(arguments) == 1 and "nothing stored" in capsys.readouterr().out
    results.store(made_up(1.0), tmp_path)
    assert compare.main(arguments) == 1 and "SLOWER" in capsys.readouterr().out
    assert compare.main([*arguments, "--slower", "1.6"]) == 0
    # A difference within the spread of both runs is no slow-down.
    fresh.write_text(json.dumps(made_up(1.5, iqr=0.6)))
    assert compare.main(arguments) == 0
    # Entries of peers are not judged. Without any stored entry of ours the comparison fails.
    fresh.write_text(json.dumps(made_up(9.0, entry="eager")))
    assert compare.main(arguments) == 1
    # A stored entry that was not measured fails the comparison.
    fresh.write_text(json.dumps(made_up(1.0)))
    capsys.readouterr()
    results.store(made_up(1.0, group="nearest_centroid many"), tmp_path)
    assert compare.main(arguments) == 1 and "GONE" in capsys.readouterr().out
    assert compare.main([*arguments, "--part"]) == 0
    more = tmp_path / "more.json"
    more.write_text(json.dumps(made_up(1.0, group="nearest_centroid many")))
    assert compare.main([str(more), *arguments]) == 0


def test_readme_and_page_show_the_stored_results():
    text = (ROOT / "README.md").read_text()
    assert text.split(report.BEGIN)[1].split(report.END)[0].strip() == report.section().strip()
    if report.VOCABULARY_BEGIN in text:
        shown = text.split(report.VOCABULARY_BEGIN)[1].split(report.VOCABULARY_END)[0]
        assert shown.strip() == report.vocabulary_section().strip()
    assert (ROOT / "docs" / "results" / "bench.md").read_text() == report.page()


def test_an_interrupted_entry_is_not_stored_and_the_page_names_uncommitted_changes(tmp_path):
    cut = made_up(1.0)
    cut["benchmarks"][0]["extra_info"]["asked"] = 6
    assert results.rows_of(cut) == []
    cut["benchmarks"][0]["stats"]["rounds"] = 6
    cut["commit_info"]["dirty"] = True
    assert "commit 012345678 with uncommitted changes" in report.where(results.load(results.store(cut, tmp_path)))


def test_the_faster_of_two_passes_of_a_commit_stays_whole(tmp_path):
    def stored(ours, eager, commit="0" * 40):
        result = made_up(ours) | {"datetime": f"2026-01-01 {ours} {eager}"}
        result["benchmarks"] += made_up(eager, entry="eager")["benchmarks"]
        result["commit_info"]["id"] = commit
        rows = results.load(results.store(result, tmp_path))["rows"]
        assert len(rows) == 2
        return {row["entry"]: row["ms"] for row in rows}, rows[0].get("passes", 1)

    assert stored(2.0, 90.0) == ({"ours": 2.0, "eager": 90.0}, 1)
    assert stored(1.0, 80.0) == ({"ours": 1.0, "eager": 80.0}, 2)
    assert stored(0.5, 85.0) == ({"ours": 1.0, "eager": 80.0}, 3), "ratios must come from one run"
    assert "best of 3 passes" in report.where(results.load(next(tmp_path.iterdir())))
    assert stored(4.0, 99.0, "f" * 40) == ({"ours": 4.0, "eager": 99.0}, 1)


def test_a_result_stored_twice_counts_as_one_pass(tmp_path):
    for _ in range(2):
        folder = results.store(made_up(1.0), tmp_path)
    assert "passes" not in results.load(folder)["rows"][0]


def test_benchmarks_import_nothing_from_the_tests():
    """The tests import the benchmarks, so an import the other way would be a circle."""
    for path in (ROOT / "bench").rglob("*.py"):
        assert not [name for name in closure.imports_of(path) if name[0] == "tests"], path


@pytest.mark.parametrize("command", main.COMMANDS)
def test_every_command_has_a_help_text(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main.main([command, "--help"])
    assert ended.value.code == 0 and f"usage: python -m bench {command} " in capsys.readouterr().out


def test_the_evaluation_of_photographs_is_timed_and_counts_the_same_again(tmp_path):
    evaluation.make_photographs(tmp_path, 64, 64, 2)
    first, again = evaluation.measure(tmp_path, "no"), evaluation.measure(tmp_path, "no")
    assert first["images_per_second"] > 0 and first["confusion"] == again["confusion"]


class TestVocabulary:
    def rows(self, **milliseconds):
        """One row per entry at K = 1000, with a peak of as many MiB."""
        row = {"op": "vocabulary training", "workload": "K=1000", "classes": 1000, "pixels": 512 * 512}
        return [{**row, "entry": name, "ms": ms, "peak_mib": ms} for name, ms in milliseconds.items()]

    def test_the_table_has_times_memory_and_what_an_entry_would_need(self):
        rows = self.rows(ours=100.0, eager=2000.0)
        many = {**rows[0], "classes": 10_000, "workload": "K=10000"}
        head, _, few, more = vocabulary.table([*rows, many])
        assert head == "| | classes | K scores, PyTorch | 16 code channels, ours |"
        assert few == "| training step | 1,000 | 2 s, 2.1 GB | 100 ms, 105 MB |"
        assert more == "| training step | 10,000 | needs 31.5 GB | 100 ms, 105 MB |"
        assert vocabulary.table([]) == []

    def test_of_two_gpu_backends_the_faster_one_is_shown(self):
        (row,) = vocabulary.series(self.rows(**{"ours (cuda)": 3.0, "ours (triton)": 2.0}), "training")["ours"]
        assert row[1]["entry"] == "ours (triton)"

    def test_an_entry_that_does_not_fit_is_refused_with_its_bytes(self):
        assert why_too_large("training", "eager", 1000, 512 * 512, 8 * 2**30) == ""
        reason = why_too_large("training", "eager", 10_000, 512 * 512, 20 * 2**30)
        assert reason.startswith("31,457,280,000 bytes") and "19,327,352,832 are free" in reason
        assert why_too_large("training", "ours", 65_536, 512 * 512, 3 * 2**30) == ""

    def test_the_memory_targets_compare_the_peaks(self):
        groups = {"vocabulary training K=1000": {row["entry"]: row for row in self.rows(ours=10.0, eager=1500.0)}}
        target = targets.times_the_memory("vocabulary training K=1000", "ours", "eager", 150)
        assert target.judge(groups) == (150.0, True)
        assert targets.peak_megabytes("vocabulary training K=1000", 10).judge(groups) == (10.48576, False)

    def test_a_chunked_head_has_the_loss_and_gradients_of_the_plain_one(self):
        leaves = [
            torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((200, 64), (5000, 64), (5000,))
        ]
        labels = torch.randint(0, 5000, (200,))
        losses = head_loss(*leaves, labels), ChunkedHead.apply(*leaves, labels, torch.float64)
        for want, got in zip(*(torch.autograd.grad(3 * loss, leaves) for loss in losses)):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)


class TestRunInParts:
    def test_every_entry_is_in_exactly_one_part(self):
        """A file is one part, or two parts with opposite `-k` expressions."""
        chosen = {}
        for file, expression in run.PARTS.values():
            chosen.setdefault(file, []).append(expression)
        assert set(chosen) == {path.name for path in (ROOT / "bench").glob("test_*.py")}
        for expressions in chosen.values():
            assert (
                expressions == [""]
                or (len(expressions) == 2 and f"not {expressions[0]}" == expressions[1])
                or (len(expressions) == 2 and f"not {expressions[1]}" == expressions[0])
            )

    def test_a_run_continues_after_a_failed_part_and_drops_rows_that_nothing_measures(
        self, tmp_path, monkeypatch, capsys
    ):
        """Uses stand-ins for the parts; checks which rows are kept, measured again, stored, dropped and rendered."""
        measured, broken = [], {"b"}

        def pretend(part, path, seconds, only=""):
            measured.append(part)
            if part in broken:
                return None, "exit 1", None
            result = made_up(1.0, group=f"nearest_centroid {part}") | {"complete": True}
            result["commit_info"]["id"] = run.commit()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(result))
            return result, "exit 0", None

        monkeypatch.setattr(run, "PARTS", dict.fromkeys("abc", ("", "")))
        monkeypatch.setattr(run, "measure", pretend)
        monkeypatch.setattr(run, "raise_on_signals", lambda: None)
        monkeypatch.setattr(report, "DRAW", {})
        readme, stored, progress = tmp_path / "README.md", tmp_path / "results", tmp_path / "progress"
        readme.write_text(f"{report.BEGIN}\n{report.END}\n")
        results.store(made_up(1.0, group="nearest_centroid old"), stored)
        progress.mkdir()
        (progress / "b.log").write_text("what went wrong")
        arguments = ["--progress", str(progress), "--results", str(stored), "--readme", str(readme)]
        assert run.main(arguments) == 1 and measured == ["a", "b", "c"]
        assert "what went wrong" in capsys.readouterr().out and "nearest_centroid a" not in readme.read_text()[:20]
        groups = {row["group"].split()[1] for row in results.load(next(stored.iterdir()))["rows"]}
        assert groups == {"a", "c", "old"}
        broken.clear()
        assert run.main([*arguments, "--seconds", "1"]) == 1 and measured == ["a", "b", "c"]
        assert run.main(arguments) == 0 and measured == ["a", "b", "c", "b"]
        groups = {row["group"].split()[1] for row in results.load(next(stored.iterdir()))["rows"]}
        assert groups == {"a", "b", "c"} and not list(progress.glob("*.json"))
        assert run.main(arguments) == 0 and measured[4:] == ["a", "b", "c"]

    def test_a_part_keeps_its_measurements_and_records_whether_it_ended(self, tmp_path, monkeypatch):
        pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed; `make install` installs it")
        for key, value in ENVIRONMENT.items():
            monkeypatch.setenv(key, value)
        path = tmp_path / "limits.json"
        result, ended, interrupted = run.measure("limits", path, 60)
        assert ended == "exit 0" and interrupted is None and result["complete"] and run.is_complete(path)
        assert {row["op"] for row in results.rows_of(result)} == {"machine"}
        assert not any("data" in item["stats"] for item in result["benchmarks"])
        assert run.measure("limits", path, 0.2)[1].startswith("stopped at its limit") and not run.is_complete(path)


class TestTargets:
    def groups(self, **times):
        rows = [{"group": "op w", "op": "op", "workload": "w", "entry": name, "ms": ms} for name, ms in times.items()]
        return results.groups_of(rows)

    def test_a_target_is_met_missed_or_not_measured(self):
        least, most = (
            targets.peer("op w", "eager", 3),
            targets.Target("", targets.ratio(("op w",), ("op w", "eager")), 0.5, at_most=True),
        )
        for eager, met in ((3.0, True), (2.9, False)):
            assert least.judge(self.groups(ours=1.0, eager=eager)) == (eager, met)
        assert most.judge(self.groups(ours=1.0, eager=2.0)) == (0.5, True)
        assert most.judge(self.groups(ours=1.1, eager=2.0))[1] is False
        assert least.judge(self.groups(ours=1.0)) == (None, None) and least.shown(None) == "not measured"

    def test_every_target_of_a_cpu_names_entries_that_are_measured(self, quick):
        """At tiny sizes, without peers that compile; the numbers of patches are mapped to those of the targets."""
        rows = results.rows_of(quick)
        for row in rows:
            row["group"] = row["group"].replace(" 4 patches", " 256 patches").replace(" 16 patches", " 1024 patches")
        groups = results.groups_of(rows)
        absent = [target.what for target in targets.CPU if target.judge(groups)[0] is None]
        left_out = ("torch.compile", "KeOps", "faiss", "cKDTree", "1 thread against 2")
        assert [what for what in absent if not any(word in what for word in left_out)] == []

    def test_missed_targets_appear_in_the_table_of_the_machine(self):
        machine = {"model": "M", "threads": 2}
        slow = self.groups(ours=1.0)
        slow["training step nano"] = {name: {"entry": name, "ms": ms} for name, ms in (("ours", 2.0), ("eager", 1.0))}
        assert [target.what for target in targets.missed(machine, slow)] == [
            "training step nano: time of eager relative to ours"
        ]
        line = next(line for line in targets.table(machine, slow) if "training step" in line)
        assert line == "| training step nano: time of eager relative to ours | at least 1x | 0.5x | **no** |"
