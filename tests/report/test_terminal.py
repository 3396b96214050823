from rich.console import Console

from croco.report.exports import results_terminal
from report.made_run import make_run


def test_the_table_shows_every_arm_group_and_interval(tmp_path):
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for part in results_terminal(make_run(tmp_path, num_prompts=2, num_tests=12)):
        console.print(part)
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
        "±",
    ):
        assert expected in text
