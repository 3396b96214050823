"""Links between the pages lead somewhere, and the index names every page."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from croco.cli.main import app

ROOT = Path(__file__).parent.parent
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), *sorted(ROOT.glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = [
        page.relative_to(ROOT / "docs").as_posix() for page in PAGES if page.is_relative_to(ROOT / "docs")
    ]
    assert [page for page in pages if page != "README.md" and f"({page})" not in index] == []


def test_every_command_on_a_page_can_be_given() -> None:
    """Each is one of ours with options that it has."""
    program = typer.main.get_command(app)
    for page in PAGES:
        blocks = re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
        lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
        for line in (line for line in lines if line.startswith("croco ")):
            command, words = program, shlex.split(line, comments=True)[1:]
            if ">" in words:
                words = words[: words.index(">")]
            while hasattr(command, "commands"):
                assert words[0] in command.commands, f"{page.name}: {line}"
                command = command.commands[words.pop(0)]
            command.make_context(command.name, words)


def test_the_citation_names_the_paper() -> None:
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    for words in ("2605.26293", "Zhang", "Basirat", "Elliott", "Cross-Lingual Contrastive Preference Tuning"):
        assert words in text
