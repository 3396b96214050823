import json
import logging
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
from rich.console import Console, RenderableType
from typer.testing import CliRunner

from croco.cli.main import app
from croco.errors import notice
from croco.report.compare import compare
from croco.report.exports import comparison_terminal, results_terminal
from croco.report.page import build_page
from croco.report.render import terminal
from croco.report.table import Table
from croco.stages.evaluate.stats import Interval
from croco.storage import shards
from croco.storage.schemas import RESULTS
from report.made_run import add_arena, make_run, write


def printed(parts: Iterable[RenderableType]) -> str:
    """What a log file gets: 80 columns, no colours."""
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for part in parts:
        console.print(part)
    return console.export_text()


def share_in_language(run: Path, values: dict[tuple[str, str], tuple[float, float, float]]) -> None:
    """Give arms a share in the right language, greedily, by group."""
    rows = [
        {"arm": arm, "language": scope, "benchmark": "lab", "metric": "right-language", "temperature": 0.0,
         "value": value, "ci_low": low, "ci_high": high, "n": 9, "seed": 0}
        for (arm, scope), (value, low, high) in values.items()
    ]  # fmt: skip
    write(run / "results", RESULTS, shards.read_table(run / "results").to_dicts() + rows)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", num_prompts=2, num_samples=3, num_tests=24)


def test_the_table_shows_every_arm_group_and_interval_in_80_columns(run: Path) -> None:
    add_arena(run, num_prompts=4)
    text = printed(results_terminal(run))
    assert max(map(len, text.splitlines())) <= 80
    for expected in (
        "base",
        "monolingual",
        "multilingual",
        "tuned",
        "low-resource",
        "held-out",
        "greedy",
        "T = 0.4",
    ):
        assert expected in text
    assert "the difference from the untuned base at the same temperature" in " ".join(text.split())
    assert "Judged against the base: win rate in percent; beneath it the difference from 50" in " ".join(
        text.split()
    )
    # no number is broken: each is a value and half the width of its interval
    table = text[text.index("Tasks seen") : text.index("Task kept")]
    numbers = re.findall(r"[+−]?\d+ ±\d+", table)
    assert len(numbers) == 4 * (3 + 2 + 2 + 2 + 2)
    assert table.count("±") == len(numbers)


def test_it_ends_with_a_sentence_per_arm_that_says_what_got_worse(run: Path) -> None:
    share_in_language(run, {
        ("base", "tuned"): (0.75, 0.72, 0.78), ("monolingual", "tuned"): (0.66, 0.62, 0.70),
        ("base", "low-resource"): (0.77, 0.7, 0.8), ("monolingual", "low-resource"): (0.5, 0.4, 0.6),
        ("base", "held-out"): (0.7, 0.6, 0.8), ("monolingual", "held-out"): (0.65, 0.55, 0.75),
        ("multilingual", "tuned"): (0.9, 0.85, 0.95),
    })  # fmt: skip
    text = " ".join(printed(results_terminal(run)).split())
    assert (
        "The share in the right language falls: tuned 75 → 66 % greedy and low-resource 77 → 50 % greedy. "
        "multilingual: " in text
    )
    assert text.endswith("The share in the right language rises: tuned 75 → 90 % greedy.")


def test_it_says_what_was_lost_on_other_benchmarks(run: Path) -> None:
    """An arm that is better on the tasks it was tuned on, worse on the one kept out, and worse before the judge."""
    add_arena(run, num_prompts=4)
    rows = shards.read_table(run / "results").to_dicts()
    for row in rows:
        if (row["arm"], row["language"], row["temperature"]) == ("multilingual", "tuned", 0.0):
            low = {("lab-held-out-task", "difference"): -0.3, ("arena", "win-rate"): 0.3}
            if value := low.get((row["benchmark"], row["metric"])):
                row |= {"value": value, "ci_low": value - 0.1, "ci_high": value + 0.1}
    write(run / "results", RESULTS, rows)
    text = " ".join(printed(results_terminal(run)).split())
    lost = "Task kept out of tuning: worse on tuned −30 greedy. Judged against the base: worse on tuned −20 greedy."
    assert lost in text[text.index(" multilingual: ") :]
    assert lost not in text[text.index(" monolingual: ") : text.index(" multilingual: ")]
    assert f'<p class="alert">{lost}</p>' in " ".join(build_page(run).split())


def test_long_names_fold_and_numbers_do_not(run: Path) -> None:
    recipe = run / "recipe.json"
    name = "monolingual-min-64-completions-with-an-nll-term"
    recipe.write_text(recipe.read_text().replace('"monolingual"', f'"{name}"'))
    rows = shards.read_table(run / "results").to_dicts()
    write(run / "results", RESULTS, [{**row, "arm": row["arm"].replace("monolingual", name)} for row in rows])
    text = printed(results_terminal(run))
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("±") == 2 * 4 * (3 + 2 + 2 + 2 + 2) + 1


def test_two_runs_in_80_columns(run: Path, tmp_path: Path) -> None:
    second = make_run(tmp_path / "second", num_prompts=2, num_samples=3, num_tests=24, seed=3)
    text = printed(comparison_terminal(compare(run, second)))
    assert max(map(len, text.splitlines())) <= 80


def test_an_unfinished_run_shows_how_far_it_came_and_where_rows_went(run: Path) -> None:
    for title in ("results", "train/multilingual"):
        shutil.rmtree(run / title)
    record = run / "pair" / "multilingual" / "stage.json"  # killed before the last shard
    made = json.loads(record.read_text()) | {"state": "running", "counts": {}, "num_shards": 2}
    record.write_text(json.dumps(made))
    (run / "pair" / "multilingual" / "dropped.parquet").unlink()
    shown = CliRunner().invoke(app, ["report", str(run)], env={"COLUMNS": "120"})
    assert shown.exit_code == 2
    lines = [" ".join(line.split()) for line in shown.stdout.splitlines()]
    assert "sample complete 42 of 42 completions kept" in lines
    assert any(
        line.startswith("pair/monolingual complete 39 of 42 completions kept; 2 cut at the") for line in lines
    )
    kept = "pair/multilingual 1 of 2 shards 39 of 42 completions kept; 2 cut at the token limit; 1 duplicate"
    assert any(line.startswith(kept) for line in lines)
    assert "train/multilingual not begun" in lines
    assert "is not finished, so there is no page: `croco run` goes on with" in shown.stderr
    assert not (run / "report").exists()


@pytest.mark.parametrize(
    ("file", "text", "sentence"),
    [
        ("recipe.json", "null", "expected a table of settings"),
        ("results/stage.json", "[]", "is no record of a stage"),
        ("results/stage.json", "{}", "is no record of a stage"),
        (
            "train/monolingual/metrics.jsonl",
            '{"step": 1}\n{"st\n',
            "metrics.jsonl, line 2: expected the metrics of a step",
        ),
        ("train/monolingual/metrics.jsonl", "[]\n", "metrics.jsonl, line 1: expected the metrics of a step"),
    ],
)
def test_what_is_damaged_is_named(run: Path, file: str, text: str, sentence: str) -> None:
    (run / file).write_text(text)
    commands = [["report", run, run]]  # one run's page first finds that a file of a stage has another size
    if "metrics" not in file:
        commands.append(["report", run, "--terminal"])
    if file == "recipe.json":
        commands.append(["compare", run, run])
    for words in commands:
        shown = CliRunner().invoke(app, [str(word) for word in words])
        assert shown.exit_code == 2, shown.output
        assert sentence in " ".join(shown.stderr.split())


def test_tables_are_not_written_to_folders(run: Path, tmp_path: Path) -> None:
    for option in ("--csv", "--markdown", "--latex"):
        shown = CliRunner().invoke(app, ["report", str(run), "--terminal", option, str(tmp_path)])
        assert shown.exit_code == 2
        assert "is a folder, expected the name of a file" in " ".join(shown.stderr.split())


def test_an_interval_of_nothing_has_no_width() -> None:
    from croco.report.table import PERCENT, Number

    assert Number(Interval(0.5, 0.5, 0.5), PERCENT).with_half_width == "50 ±0"


def test_nothing_that_a_model_or_a_server_wrote_steers_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    steering = "name\x1b[2J\x9b1m\u202e\x07"
    table = Table([steering, "n"], [[steering, steering]], 2, steering)
    Console(width=80).print(terminal(table))
    notice(f"not read: {steering}")
    assert logging.lastResort is not None
    warning = logging.LogRecord("croco", logging.WARNING, "", 1, "a server says %s", (steering,), None)
    print(logging.lastResort.format(warning))
    found = capsys.readouterr()
    assert "name\\x1b[2J\\x9b1m\\u202e\\x07" in found.out
    assert not set("\x1b\x9b\u202e\x07") & set(found.out + found.err)
    assert "name" in found.err
