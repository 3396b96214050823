from rich.console import Console

from croco.report.terminal import results_table
from report.made_run import make_run


def test_the_table_shows_every_arm_group_and_interval(tmp_path):
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(results_table(make_run(tmp_path, num_prompts=2, num_tests=12)))
    text = console.export_text()
    for expected in (
        "base",
        "monolingual",
        "multilingual",
        "tuned",
        "low-resource",
        "held-out",
        "greedy",
        "T = 0.4",
        "[",
    ):
        assert expected in text
