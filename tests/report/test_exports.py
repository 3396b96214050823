import io
import re
import shutil
import subprocess

import polars as pl
import pytest
from typer.testing import CliRunner

from croco.cli.main import app
from croco.errors import UserError
from croco.report.exports import results_latex
from croco.report.load_run import read_results
from croco.report.render import escape
from croco.storage import shards
from report.made_run import add_arena, make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    made = make_run(tmp_path_factory.mktemp("exports"), num_prompts=2, num_samples=3, num_tests=24)
    add_arena(made, num_prompts=4)
    return made


def test_csv_holds_every_row(run):
    found = pl.read_csv(io.StringIO(read_results(run).results.write_csv()))
    expected = shards.read_table(run / "results")
    assert found.columns == expected.columns
    assert found.height == expected.height
    assert found["value"].to_list() == pytest.approx(expected["value"].to_list())


def test_latex_has_arms_as_rows_and_languages_as_columns(run):
    text = results_latex(run)
    tables = re.findall(r"\\begin\{tabular\}\{(l[r]+)\}(.*?)\\end\{tabular\}", text, flags=re.DOTALL)
    assert (
        len(tables) == 2 * 3 + 1 + 1
    )  # two benchmarks at three temperatures, the arena, one language's tasks
    for columns, body in tables:
        rows = body.split(r"\midrule")[1].split(r"\bottomrule")[0].strip().splitlines()
        assert all(row.endswith(r"\\") and row.count(" & ") == len(columns) - 1 for row in rows)
    greedy = tables[0][1]
    assert greedy.index(r"\multicolumn{7}{c}{tuned}") < greedy.index(r"\multicolumn{3}{c}{held-out}")
    assert [
        line.split(" & ")[0] for line in greedy.splitlines() if line.startswith(("base", "mono", "multi"))
    ] == [
        "base",
        "monolingual",
        "multilingual",
    ]


def test_the_best_of_a_column_is_bold(run):
    results = read_results(run).results
    rows = results.filter(
        (pl.col("benchmark") == "lab")
        & (pl.col("language") == "da")
        & (pl.col("temperature") == 0)
        & (pl.col("metric") == "good")
    )
    values = {arm: f"{100 * value:.0f}" for arm, value in rows.select("arm", "value").iter_rows()}
    table = results_latex(run).split(r"\end{table}")[0]
    place = re.search(r"^arm & (.*) \\\\$", table, flags=re.MULTILINE)[1].split(" & ").index("da") + 1
    for arm, value in values.items():
        cell = (
            re.search(rf"^{arm} & .*$", table, flags=re.MULTILINE)[0].removesuffix(r" \\").split(" & ")[place]
        )
        is_best = float(value) == max(map(float, values.values()))
        assert cell == (rf"\textbf{{{value}}}" if is_best else value)


def test_nothing_is_bold_where_all_are_the_same(run):
    alone = next(table for table in results_latex(run).split(r"\end{table}") if "T = 0.4" in table)
    assert alone.count("\nbase & ") == 1  # the other arms were not evaluated at this temperature
    assert r"\textbf" not in alone


def test_intervals_are_printed_when_asked_for(run):
    assert r"{\tiny [" in results_latex(run, intervals=True)
    assert "tiny" not in results_latex(run)


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no LaTeX on this machine")
def test_latex_sets_the_tables(run, tmp_path):
    """Every table of the run in a document of class article, without an error or a missing character."""
    for intervals in (False, True):
        text = results_latex(run, intervals)
        document = (
            rf"\documentclass{{article}}\usepackage{{booktabs}}\begin{{document}}{text}\end{{document}}"
        )
        (tmp_path / "t.tex").write_text(document, encoding="utf-8")
        command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"]
        made = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
        assert made.returncode == 0, made.stdout[-2000:]
        assert (tmp_path / "t.pdf").stat().st_size > 10_000


def test_latex_is_given_no_commands():
    assert escape(r"50% & \input{x} #1_a$") == r"50\% \& \textbackslash{}input\{x\} \#1\_a\$"


def test_the_command_prints_or_writes_without_making_the_page(run, tmp_path):
    words = [
        "report",
        str(run),
        "--terminal",
        "--csv",
        str(tmp_path / "r.csv"),
        "--latex",
        str(tmp_path / "r.tex"),
    ]
    found = CliRunner().invoke(app, words, env={"COLUMNS": "140"})
    assert found.exit_code == 0, found.output
    assert "monolingual" in found.stdout
    assert "Judged against the base" in found.stdout
    assert not (run / "report").exists()
    assert (tmp_path / "r.csv").read_text().startswith("arm,language,benchmark,metric")
    assert r"\toprule" in (tmp_path / "r.tex").read_text()


def test_a_run_without_an_arm_is_named(tmp_path):
    made = make_run(tmp_path / "run", num_prompts=2, num_samples=3, num_tests=8)
    rows = shards.read_table(made / "results").filter(pl.col("arm") != "multilingual").to_dicts()
    from croco.storage.schemas import RESULTS
    from report.made_run import write

    write(made / "results", RESULTS, rows)
    for command in (
        ["report", str(made), "--terminal"],
        ["report", str(made), "--terminal", "--csv", "x.csv"],
    ):
        found = CliRunner().invoke(app, command)
        assert found.exit_code == 2
        assert "lack the arm multilingual" in found.stderr
    (made / "results" / "stage.json").unlink()
    with pytest.raises(UserError, match="has no complete stage results: run"):
        results_latex(made)
