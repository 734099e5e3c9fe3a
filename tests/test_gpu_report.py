"""The GPU report: steps and budgets, interruption and resumption, archive and import. These tests judge no time."""

import contextlib
import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import tarfile

import pytest
import torch

from bench import gpu_archive, gpu_report, gpu_steps, gpu_timing, preferences, report, results
from bench.gpu_steps import Step

ROOT = pathlib.Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def made_up(ms=1.0, entry="ours (cuda)", op="distance_correction"):
    """A pytest-benchmark result of one entry that was timed by CUDA events."""
    info = {"op": op, "workload": "ade512", "spread": 0.3, "entry": entry, "pixels": 1}
    info |= {"ms": ms, "iqr_ms": 0.01, "rounds": 9, "clock": "graph", "host_ms": 0.02, "stream_ms": ms}
    stats = {"median": 1e-7, "iqr": 0.0, "rounds": 1, "data": [1e-7]}
    return {
        "benchmarks": [{"group": f"{op} ade512", "stats": stats, "extra_info": info}],
        "machine_info": {"model": "Some CPU", "threads": 16, "torch": "2.11.0", "gpu": "NVIDIA Pretend"},
        "commit_info": {"id": "0123456789ab", "dirty": False},
        "datetime": "2026-01-01T00:00:00",
    }


def step(name, code, *arguments, limit=30.0, **options):
    return Step(name, "first", (sys.executable, "-c", code, *arguments), limit, 1, "none", **options)


@pytest.fixture
def made(tmp_path):
    return gpu_report.Report(tmp_path / "report", tmp_path / "report.tar.gz", 60)


class TestSteps:
    @pytest.mark.parametrize("preset", ["first", "second"])
    def test_expected_seconds_fit_the_budget(self, preset):
        expected = [step.expected for step in gpu_steps.steps() if step.preset == preset]
        assert sum(expected) <= gpu_steps.BUDGETS[preset] and min(expected) > 0

    def test_both_calls_and_two_starts_fit_fifteen_minutes(self):
        expected = sum(step.expected for step in gpu_steps.steps() if step.preset != "rest")
        assert expected + 2 * 155 <= 900  # a bare machine took 155 s to start

    def test_checks_come_before_timings_and_our_entries_before_peers(self):
        names = [step.name for step in gpu_steps.steps()]
        order = ["load", "smoke cuda", "field cuda", "smoke triton", "own field", "own pixel ops", "peers correction"]
        assert [name for name in names if name in order] == order

    def test_names_are_unique_and_every_chosen_file_exists(self):
        found = gpu_steps.steps()
        assert len({gpu_archive.file_name(step.name) for step in found}) == len(found)
        for each in found:
            for part in each.command:
                if part.startswith(("bench/", "tests/")):
                    assert (ROOT / part).exists(), part

    def test_an_unknown_step_is_named(self):
        with pytest.raises(SystemExit, match=r"wanted names of .*first.*; got nonsense"):
            gpu_report.chosen_steps(["nonsense"], dry=True)

    def test_entries_of_bench_steps_can_be_narrowed(self):
        load, field = gpu_report.chosen_steps(["load", "own field"], dry=False, only="XL")
        assert "XL" not in " ".join(load.command)
        assert "(ours and bfloat16 and (4096 or 1024)) and (XL)" in field.command

    def test_the_table_gives_the_sums(self):
        text = "\n".join(gpu_steps.table(gpu_steps.steps()))
        total = sum(step.expected for step in gpu_steps.steps() if step.preset == "first")
        assert f"| all of `first` | first | {total:g} | 200 | |" in text


def test_the_guide_shows_the_steps():
    shown = (
        (ROOT / "docs" / "guides" / "gpu.md")
        .read_text()
        .split("<!-- steps begin -->\n")[1]
        .split("\n<!-- steps end -->")[0]
    )
    assert shown == "\n".join(gpu_steps.table(gpu_steps.steps()))


class TestRun:
    def test_failing_missing_and_slow_steps_do_not_stop_the_others(self, made, monkeypatch):
        monkeypatch.setattr(gpu_report, "SHORTEST", 0.1)
        assert not made.run(step("bad", "print('WRONG nearest_centroid'); raise SystemExit('no such thing')"))
        assert not made.run(Step("gone", "first", ("no-such-program",), 5, 1, ""))
        assert not made.run(step("slow", "import time; time.sleep(60)", limit=0.5))
        assert made.run(step("good", "print('here')"))
        text = (made.folder / "report.txt").read_text()
        assert "FAILED    bad: exit 1" in text and "no such thing" in text and "WRONG nearest_centroid" in text
        assert "left out  gone: no-such-program was not found" in text
        assert "FAILED    slow: stopped at its limit" in text
        assert "ok        good: exit 0" in text and "here" in text

    def test_nothing_starts_once_the_time_is_used_up(self, tmp_path):
        late = gpu_report.Report(tmp_path / "r", tmp_path / "r.tar.gz", 3)
        assert not late.run(step("late", ""))
        assert "left out  late: the time is used up" in (tmp_path / "r" / "report.txt").read_text()

    def test_a_second_run_skips_what_is_done_and_repeats_what_failed(self, tmp_path, monkeypatch, capsys):
        flag = tmp_path / "mended"
        failing = step("b", "import pathlib, sys; sys.exit(not pathlib.Path(sys.argv[1]).exists())", str(flag))
        monkeypatch.setattr(gpu_steps, "steps", lambda dry=False: [step("a", ""), failing, step("c", "")])
        monkeypatch.setattr(gpu_report, "raise_on_signals", lambda: None)
        arguments = ["--dry-run", "--steps", "first", "--folder", str(tmp_path / "r")]
        assert gpu_report.main(arguments) == 1
        assert "FAILED    b" in capsys.readouterr().out
        flag.touch()
        assert gpu_report.main(arguments) == 0
        text = capsys.readouterr().out
        assert "done      a" in text and "ok        b" in text and "done      c" in text

    def test_a_rehearsal_another_commit_or_selection_do_not_count_as_done(self, tmp_path, monkeypatch):
        monkeypatch.setenv("FLOWSEG_BENCH_COMMIT", "a")
        make = functools.partial(gpu_report.Report, tmp_path / "r", tmp_path / "r.tar.gz", 60)
        assert make().run(step("a", "")) and make().is_done(step("a", ""))
        assert not make(dry=True).is_done(step("a", "")) and not make(only="XL").is_done(step("a", ""))
        monkeypatch.setenv("FLOWSEG_BENCH_COMMIT", "b")
        assert not make().is_done(step("a", ""))

    def test_a_second_attempt_keeps_the_results_of_the_first(self, made):
        code = "import pathlib, sys; pathlib.Path(sys.argv[2].split('=')[1]).write_text(sys.argv[1])"
        for result in (made_up(1.0), made_up(2.0, "ours (triton)"), "{ cut"):
            text = result if isinstance(result, str) else json.dumps(result)
            made.run(step("own", code, text, bench=True))
        assert len(gpu_archive.results_in(made.folder)) == 2 and made.archive.exists()
        assert made.state["own"]["entries"] == 0 and made.state["own"]["ended"] == "exit 0"

    def test_a_selection_without_entries_is_reported(self, tmp_path, capsys):
        report = gpu_report.Report(tmp_path / "r", tmp_path / "r.tar.gz", 60, only="nothing")
        assert report.run(step("own", "raise SystemExit(5)", bench=True))
        assert "--only 'nothing' leaves no entry of it" in capsys.readouterr().out

    def test_the_report_ends_if_the_library_does_not_load(self, tmp_path, monkeypatch, capsys):
        found = [step("load", "raise SystemExit('no kernels')", vital=True), step("next", "")]
        monkeypatch.setattr(gpu_steps, "steps", lambda dry=False: found)
        monkeypatch.setattr(gpu_report, "raise_on_signals", lambda: None)
        assert gpu_report.main(["--dry-run", "--steps", "first", "--folder", str(tmp_path / "r")]) == 1
        text = capsys.readouterr().out
        assert "no kernels" in text and "every later step depends on load" in text and "next" not in text

    def test_without_a_gpu_it_says_so(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert gpu_report.main(["--folder", str(tmp_path / "r")]) == 1
        assert "--dry-run" in capsys.readouterr().out

    def test_a_bench_step_stopped_at_its_limit_keeps_its_results(self, made, tmp_path):
        pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed; `make install` installs it")
        test = tmp_path / "test_slow.py"
        test.write_text(
            "import time\n"
            "def test_first(benchmark):\n"
            "    benchmark.extra_info.update(op='op', workload='w', entry='ours', pixels=1)\n"
            "    benchmark.pedantic(lambda: None, rounds=1)\n"
            "def test_second():\n    time.sleep(60)\n"
        )
        command = (sys.executable, "-m", "pytest", str(test), "-p", "no:cacheprovider", "--rootdir", str(tmp_path))
        # A background job of a shell script ignores SIGINT; stopping the step must work there too.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            assert not made.run(Step("cut", "first", command, 8, 1, "", bench=True))
        finally:
            signal.signal(signal.SIGINT, before)
        assert made.state["cut"]["entries"] == 1
        (kept,) = gpu_archive.results_in(made.folder)
        assert "data" not in kept["benchmarks"][0]["stats"]


class _Clock:
    """A pretended GPU: events read a clock, and each call advances it."""

    now = 0.0

    class Event:
        def __init__(self, enable_timing):
            self.at = None

        def record(self):
            self.at = _Clock.now

        def elapsed_time(self, end):
            return (end.at - self.at) * 1e3

    class CUDAGraph:
        def replay(self):
            _Clock.now += 1e-3 * self.calls

    class Stream:
        def wait_stream(self, other):
            pass


class TestTiming:
    @pytest.fixture
    def calls(self, monkeypatch):
        """A list of the inputs of all calls. A call on the pretended GPU takes 2 ms, in a graph 1 ms."""
        made = []

        @contextlib.contextmanager
        def graph(which):
            before = len(made)
            yield
            which.calls = len(made) - before

        for name in ("Event", "CUDAGraph", "Stream"):
            monkeypatch.setattr(torch.cuda, name, getattr(_Clock, name))
        monkeypatch.setattr(torch.cuda, "graph", graph)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", _Clock.Stream)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        return made

    def run(self, calls):
        def call(inputs):
            calls.append(inputs)
            _Clock.now += 2e-3

        return call

    def test_a_graph_and_consecutive_calls_are_timed_over_all_inputs(self, calls):
        found = gpu_timing.call_times(self.run(calls), [1, 2, 3])
        assert found["clock"] == "graph" and found["ms"] == pytest.approx(1.0)
        assert found["stream_ms"] == pytest.approx(2.0) and found["calls"] % 3 == 0 and found["calls"] <= 51
        assert {calls.count(i) for i in (1, 2, 3)} <= set(range(len(calls) // 3 - 5, len(calls) // 3 + 6))

    def test_without_a_graph_the_time_of_consecutive_calls_counts(self, calls):
        found = gpu_timing.call_times(self.run(calls), [1], graph=False)
        assert found["clock"] == "events" and found["ms"] == found["stream_ms"] == pytest.approx(2.0)

    def test_the_reason_against_a_graph_is_recorded_and_the_time_kept(self, calls, monkeypatch):
        def refuse(which):
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

        monkeypatch.setattr(torch.cuda, "graph", refuse)
        found = gpu_timing.call_times(self.run(calls), [1])
        assert found["clock"] == "events" and found["no_graph"] == "operation not permitted when stream is capturing"
        assert found["ms"] == pytest.approx(2.0)

    def test_a_failing_profiler_returns_no_kernels(self, calls, monkeypatch):
        monkeypatch.setattr(torch.profiler, "profile", lambda **options: 1 / 0)
        assert gpu_timing.kernel_times(self.run(calls), [1]) == {}


class TestArchive:
    def folder(self, tmp_path):
        folder = tmp_path / "report"
        folder.mkdir()
        (folder / "own.json").write_text(json.dumps(made_up()))
        slower = made_up(2.0, "ours (triton)") | {"datetime": "2026-01-01T00:01:00"}
        (folder / "peers.json").write_text(json.dumps(slower))
        (folder / "own.log").write_text("whole log\n")
        gpu_archive.write_state(folder, {"own": {"ended": "exit 0"}})
        return folder

    def test_import_stores_results_and_writes_preferences_and_pages(self, tmp_path, capsys):
        archive = tmp_path / "a.tar.gz"
        gpu_archive.pack(self.folder(tmp_path), archive)
        with tarfile.open(archive) as tar:
            assert {"state.json", "own.json", "own.log"} <= set(tar.getnames())
        readme, stored = tmp_path / "README.md", tmp_path / "results"
        readme.write_text(f"{report.BEGIN}\n{report.END}\n")
        chosen = tmp_path / "preferences.json"
        arguments = ["--results", str(stored), "--readme", str(readme), "--preferences", str(chosen)]
        assert gpu_archive.main([str(archive), *arguments]) == 0
        rows = results.load(stored / "nvidia-pretend")["rows"]
        assert {row["entry"]: row["ms"] for row in rows} == {"ours (cuda)": 1.0, "ours (triton)": 2.0}
        order = json.loads(chosen.read_text())["distance_correction"]
        assert order["order"] == ["cuda", "triton"] and "measured on NVIDIA Pretend" in order["because"]
        assert set(json.loads(chosen.read_text())) == set(preferences.OPS)
        assert "NVIDIA Pretend" in (tmp_path / "docs" / "results" / "bench.md").read_text()

    def test_an_archive_without_results_changes_nothing(self, tmp_path, capsys):
        (tmp_path / "r").mkdir()
        (tmp_path / "r" / "load.log").write_text("no\n")
        gpu_archive.pack(tmp_path / "r", tmp_path / "a.tar.gz")
        assert gpu_archive.main([str(tmp_path / "a.tar.gz"), "--results", str(tmp_path / "results")]) == 1
        assert "wanted results" in capsys.readouterr().out and not (tmp_path / "results").exists()

    def test_results_of_a_dry_run_are_refused(self, tmp_path, capsys):
        folder = tmp_path / "r"
        folder.mkdir()
        rehearsed = made_up()
        del rehearsed["machine_info"]["gpu"]
        (folder / "own.json").write_text(json.dumps(rehearsed))
        assert gpu_archive.main([str(folder), "--results", str(tmp_path / "results")]) == 1
        assert "those of a dry run" in capsys.readouterr().out and not (tmp_path / "results").exists()

    @pytest.mark.parametrize("content", [None, b"", b"no archive", b"cut"])
    def test_a_missing_foreign_or_truncated_archive_is_an_error(self, tmp_path, content):
        path = tmp_path / "a.tar.gz"
        if content == b"cut":
            gpu_archive.pack(self.folder(tmp_path), path)
            path.write_bytes(path.read_bytes()[:200])
        elif content is not None:
            path.write_bytes(content)
        with pytest.raises(SystemExit, match="archive: wanted"):
            gpu_archive.main([str(path), "--results", str(tmp_path / "results")])

    def test_a_long_log_keeps_its_ends(self, tmp_path, monkeypatch):
        monkeypatch.setattr(gpu_archive, "LONGEST_LOG", 1000)
        folder = tmp_path / "r"
        folder.mkdir()
        (folder / "long.log").write_text("begin" + "x" * 5000 + "end")
        gpu_archive.pack(folder, tmp_path / "a.tar.gz")
        gpu_archive.unpack(tmp_path / "a.tar.gz", tmp_path / "out")
        text = (tmp_path / "out" / "long.log").read_text()
        assert text.startswith("begin") and text.endswith("end") and len(text) < 1100

    def test_a_truncated_state_file_counts_as_no_state(self, tmp_path):
        (tmp_path / "state.json").write_text('{"load": {"end')
        assert gpu_archive.read_state(tmp_path) == {}


def test_an_interrupted_dry_run_continues_and_its_archive_is_imported(tmp_path):
    """`first` and `second` at tiny sizes on the CPU: interrupted in the middle, started again, imported."""
    pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed; `make install` installs it")
    every = [each for each in gpu_steps.steps(dry=True) if each.preset != "rest"]
    # Without a GPU some steps run the same command; one of each is enough.
    chosen = {(each.command, tuple(each.environment.items())): each for each in every}.values()
    assert len(chosen) >= len(every) - 3
    command = [sys.executable, "-m", "bench", "gpu", "--dry-run", "--folder", str(tmp_path / "r")]
    command += ["--steps", ",".join(each.name for each in chosen)]
    run = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    for line in run.stdout:
        if line.startswith("ok        own field"):
            break
    run.send_signal(signal.SIGTERM)
    rest = run.communicate(timeout=60)[0]
    assert "interrupted by SIGTERM: start again to continue" in rest and run.returncode == 1
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "done      own field" in done.stdout and "ok        own pixel ops" in done.stdout
    for each in chosen:
        assert gpu_archive.read_state(tmp_path / "r")[each.name]["ended"] == "exit 0", each.name
    readme = tmp_path / "README.md"
    readme.write_text(f"{report.BEGIN}\n{report.END}\n")
    command = [sys.executable, "-m", "bench", "gpu-import", str(tmp_path / "r.tar.gz"), "--rehearsal"]
    command += ["--results", str(tmp_path / "s")]
    command += ["--readme", str(readme), "--preferences", str(tmp_path / "p.json")]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "distance_correction ade512" in (tmp_path / "docs" / "results" / "bench.md").read_text()
