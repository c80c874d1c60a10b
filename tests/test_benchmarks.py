"""The benchmarks run, and write down what they find. What they find is not judged here."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Final, TypeAlias

import pytest

from benchmarks.stores import ROOT_PREFIX, SHARED
from tests.processes import until, with_directory

ROOT: Final = Path(__file__).parents[1]
COMMAND: Final = [sys.executable, "-m", "benchmarks", "--smoke", "--output"]

Found: TypeAlias = tuple[dict[str, Any], str, Path]
"""A run's JSON, what it printed, and where it wrote."""


def run(*arguments: str, output: Path) -> str:
    """Run the suite in its smallest form, and return what it prints."""
    done = subprocess.run(
        [*COMMAND, str(output), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Run all cases once."""
    output = tmp_path_factory.mktemp("benchmarks")
    text = run(output=output)
    return json.loads((output / "results.json").read_text()), text, output


def test_every_case_has_a_positive_figure(found: Found) -> None:
    report, _, _ = found
    figures = {
        (case["name"], measure["name"]): measure["figure"]["median"]
        for case in report["cases"]
        for measure in case["measures"]
    }
    assert figures
    assert not [name for name, median in figures.items() if not median > 0]


def test_every_comparison_with_a_limit_is_judged(found: Found) -> None:
    report, text, _ = found
    compared = [comparison for case in report["cases"] for comparison in case["comparisons"]]
    assert len([c for c in compared if c["limit"] is not None]) >= 15
    for c in compared:
        judged = None if c["limit"] is None else c["figure"]["median"] <= c["limit"]
        assert c["met"] is judged
        assert c["claim"] in text


def test_nobody_elses_session_went_with_the_dead(found: Found) -> None:
    report, _, _ = found
    case = next(case for case in report["cases"] if case["name"] == "deaths-at-once")
    touched = next(c for c in case["comparisons"] if "touched" in c["claim"])
    assert touched["figure"]["median"] == 0


def test_no_read_failed_while_managers_died(found: Found) -> None:
    report, _, _ = found
    failed = [
        comparison["figure"]["median"]
        for case in report["cases"]
        for comparison in case["comparisons"]
        if "reads that failed" in comparison["claim"]
    ]
    assert failed == [0, 0, 0]


def test_a_whole_run_says_where_it_ran_and_draws_it(found: Found) -> None:
    report, _, output = found
    assert report["whole"]
    assert {"cpu", "cores", "kernel", "python", "packages"} <= report["machine"].keys()
    assert (output / "results.png").read_bytes().startswith(b"\x89PNG")


def test_only_runs_what_it_names(tmp_path: Path) -> None:
    run("--only", "count", "--only", "bytes", "--no-plot", output=tmp_path)
    report = json.loads((tmp_path / "results.json").read_text())
    assert [case["name"] for case in report["cases"]] == ["count", "bytes"]
    assert not report["whole"]
    assert not (tmp_path / "results.png").exists()


def test_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    """Neither a directory in shared memory, nor a manager or helper."""
    # A shell's background job, as this run may be, has it ignored, and children would too.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [*COMMAND, str(tmp_path)],  # all cases: it is not done when the signal comes, however late
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    signal.signal(signal.SIGINT, before)
    prefix = f"{ROOT_PREFIX}{process.pid}-"
    try:
        until(lambda: list(SHARED.glob(f"{prefix}*/*.table")))
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert b"KeyboardInterrupt" in said
    assert not list(SHARED.glob(f"{prefix}*"))
    until(lambda: not with_directory(SHARED / prefix))
