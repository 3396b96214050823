"""Progress where there is no terminal: a line now and then."""

from __future__ import annotations

import time

import pytest

from croco.pipeline import progress


def test_a_line_says_how_far_how_fast_and_how_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.05)
    with progress.progress("sample", 6000, "completion", done=200) as bar:
        bar.advance(400)
        bar.advance(600)
        time.sleep(0.2)
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 4
    assert all(line.startswith("sample: 1,200 of 6,000 completions (20 %), ") for line in lines)
    assert all(line.endswith(" s left") for line in lines)


def test_the_rate_counts_from_the_first_units_that_this_process_did(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    lines = progress._Lines("sample", 6000, "completion", done=200)
    now = 160.0  # a model was loaded
    assert lines.line(now) == "sample: 200 of 6,000 completions (3 %)"
    lines.advance(100)
    assert lines.line(now + 5) == "sample: 300 of 6,000 completions (5 %)"
    lines.advance(900)
    assert lines.line(now + 22.5) == "sample: 1,200 of 6,000 completions (20 %), 40.0 a second, 2 min left"
    assert (
        lines.line(now + 3600) == "sample: 1,200 of 6,000 completions (20 %), 15.0 a minute, 5 h 20 min left"
    )


def test_a_short_stage_says_nothing(capsys: pytest.CaptureFixture) -> None:
    with progress.progress("pair", 3, "shard") as bar:
        bar.advance(3)
    assert capsys.readouterr().err == ""


def test_work_that_counts_nothing_says_how_long_it_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.05)

    def wait_for(text: str) -> None:
        seen, end = "", time.monotonic() + 30
        while text not in seen:
            assert time.monotonic() < end, seen
            time.sleep(0.02)
            seen += capsys.readouterr().err

    with progress.heartbeat("results"):
        wait_for("results: since 0 s")
        with progress.progress("results", 6, "row"):
            wait_for("results: 0 of 6 rows")
            capsys.readouterr()
            time.sleep(0.2)
            assert "since" not in capsys.readouterr().err
