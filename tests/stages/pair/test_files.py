"""What other tools wrote comes in, and what every trainer reads goes out: real files, `datasets`, TRL."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from conftest import write_recipe
from croco.config.load import load
from croco.config.runtime import Runtime
from croco.errors import StaleStage, UserError
from croco.pipeline.run import running_in
from croco.stages.pair.export_trl import export_node
from croco.stages.pair.from_files import facts_of, pairs_of_files
from croco.stages.pair.import_files import import_pairs, import_scored
from croco.storage import records, shards
from croco.storage.rows import files_of

SYSTEM = {"role": "system", "content": "You have a clock: clock()"}
TURNS = [SYSTEM, {"role": "user", "content": "What time?"}, {"role": "assistant", "content": "clock()"},
         {"role": "tool", "content": "12:00"}]  # fmt: skip


def jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def published(prompts: int = 6, completions: int = 8) -> list[dict]:
    """A line per completion, its conversation with the answer in it; all prompts have the same text."""
    return [
        {"id": p, "lang": language, "reward": float((7 * s + p) % completions),
         "messages": [*TURNS, {"role": "assistant", "content": f"{language}: it is {s} past {p}."}]}
        for p in range(prompts) for language in ("en", "da") for s in range(completions)
    ]  # fmt: skip


COLUMNS = ["prompt_id=id", "language=lang", "score=reward"]


def made(tmp_path: Path, form: str = "preference", **given) -> Path:
    source = jsonl(tmp_path / "scored.jsonl", published())
    options = {"columns": COLUMNS, "language": None, "overrides": [], "license": "cc-by-4.0", **given}
    pairs_of_files([source], tmp_path / "out", form=form, **options)
    return tmp_path / "out"


def test_scored_conversations_become_pairs_that_datasets_loads(tmp_path):
    out = made(tmp_path)
    import datasets

    loaded = datasets.load_dataset(
        "parquet", data_files=str(out / "export/data/*.parquet"), cache_dir=str(tmp_path / "c")
    )
    rows = loaded["train"]
    assert len(rows) == 12  # one text under six ids stays six prompts
    first = rows[0]
    assert first["prompt"] == TURNS  # system, tool and earlier turns survive
    assert [first["chosen"][0]["role"], first["rejected"][0]["role"]] == ["assistant", "assistant"]
    assert first["score_chosen"] > first["score_rejected"]
    card = (out / "export/README.md").read_text()
    assert 'license: "cc-by-4.0"' in card
    assert "| da | 6 |" in card
    assert "| rejected | mean-2std |" in card


def test_a_call_that_stopped_at_its_first_row_is_no_obstacle_to_the_right_one(tmp_path):
    with pytest.raises(UserError, match="line 1: no language in column 'language'"):
        made(tmp_path, columns=COLUMNS[:1])
    assert (made(tmp_path) / "export/README.md").exists()
    with pytest.raises(StaleStage) as raised:
        made(tmp_path, columns=[])
    assert "columns.language: lang → (not there)" in str(raised.value)
    assert "columns: " not in str(raised.value)


def test_a_score_that_is_null_goes_to_the_ledger_as_one_that_is_no_number(tmp_path):
    """What pandas writes into JSON for a NaN."""
    rows = [
        row | {"reward": None if number == 3 else row["reward"]} for number, row in enumerate(published())
    ]
    options = (COLUMNS, None, [], "preference", "unknown")
    pairs_of_files([jsonl(tmp_path / "scored.jsonl", rows)], tmp_path / "out", *options)
    dropped = shards.read_dropped(tmp_path / "out/pairs").filter(unit="completion")
    assert shards.reasons(dropped) == [("completion", "score is not finite", 1)]
    one_side = {
        "prompt_id": "a",
        "language": "da",
        "prompt": "q",
        "chosen": "a",
        "rejected": "b",
        "score_chosen": 1.0,
    }
    with pytest.raises(UserError, match="line 1, rejected: no score in column"):
        import_scored([jsonl(tmp_path / "pairs.jsonl", [one_side])], tmp_path / "in")


def test_trl_trains_on_the_export_unmodified(tmp_path, tiny_models):
    out = made(tmp_path)
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    def trained(folder: Path, trainer, config, **options):
        rows = datasets.load_dataset(
            "parquet", data_files=str(folder / "*.parquet"), cache_dir=str(tmp_path / "c")
        )["train"]
        arguments = config(output_dir=str(tmp_path / "t"), max_steps=1, per_device_train_batch_size=2, report_to=[],
                           use_cpu=True, bf16=False, **options)  # fmt: skip
        made = trainer(
            model=AutoModelForCausalLM.from_pretrained(tiny_models.policy),
            args=arguments,
            train_dataset=rows,
            processing_class=AutoTokenizer.from_pretrained(tiny_models.policy),
        )
        return made.train().training_loss

    assert trained(out / "export/data", DPOTrainer, DPOConfig) > 0
    sft = made(tmp_path / "sft_", "prompt-completion") if (tmp_path / "sft_").mkdir() is None else None
    assert trained(sft / "export/data", SFTTrainer, SFTConfig) > 0


def test_our_own_export_and_folder_are_read_again(tmp_path):
    out = made(tmp_path)
    again, _ = import_pairs(files_of(out))
    exported, _ = import_pairs(files_of(out / "export"))
    pairs, _ = import_pairs(files_of(out / "pairs"))
    assert again.equals(exported)
    assert exported.drop("where").equals(pairs.select(exported.drop("where").columns))
    options = {"columns": [], "language": None, "overrides": [], "form": "preference", "license": "mit"}
    assert pairs_of_files([out / "export"], tmp_path / "twice", **options) == again.height


def test_data_for_sft_is_the_best_completion(tmp_path):
    out = made(tmp_path, "prompt-completion", overrides=["pool=all"])
    rows = pl.read_parquet(out / "export/data/*.parquet")
    assert rows.height == 6
    assert rows["score"].to_list() == [7.0] * 6


def test_ultrafeedback_and_trl_files_are_read(tmp_path):
    ultra = [
        {
            "prompt_id": "a",
            "instruction": "Why?",
            "completions": [{"response": f"r{i}", "overall_score": i} for i in range(3)],
        }
    ]
    pl.DataFrame(ultra).write_parquet(tmp_path / "ultra.parquet")
    assert import_scored([tmp_path / "ultra.parquet"], tmp_path / "u", language="en") == {"en": 3}
    assert shards.read_table(tmp_path / "u/sample")["completion"].to_list() == ["r0", "r1", "r2"]
    said = {"role": "user", "content": "Why?"}
    trl = [{"prompt_id": "b", "language": "da", "score_chosen": 2.0, "score_rejected": 1.0,
            **{side: [said, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")}}]  # fmt: skip
    assert import_scored([jsonl(tmp_path / "trl.jsonl", trl)], tmp_path / "t") == {"da": 2}
    assert shards.read_table(tmp_path / "t/prompts")["messages"].to_list() == [[said]]
    assert shards.read_table(tmp_path / "t/score")["score"].to_list() == [2.0, 1.0]


ROW = {
    "prompt_id": "a",
    "language": "en",
    "messages": [{"role": "user", "content": "Why?"}],
    "completion": "So.",
    "score": 1,
}


@pytest.mark.parametrize(("rows", "message"), [
    ([{**ROW, "prompt_id": None}], r"line 1: no prompt_id in column 'prompt_id'.*--column prompt_id=NAME"),
    ([ROW, {**ROW, "score": "high"}], "line 2: score is text, expected a number"),
    ([{name: value for name, value in ROW.items() if name != "score"}], "line 1: no score in column 'score'"),
    ([ROW, {**ROW, "messages": "How?"}], "line 2: prompt_id 'a' in 'en' is another prompt than before"),
    ([{**ROW, "messages": [{"role": "user"}]}], "line 1, message 1: content is missing"),
    ([{**ROW, "sample_id": -1}], "line 1: sample_id is a number, expected a whole number from 0 on"),
    ([{**ROW, "sample_id": 2**40}], r"line 1: sample_id is 1099511627776, expected a whole number from 0 on"),
    ([{**ROW, "score": 10**400}], "line 1: score has more digits than"),
    ([{**ROW, "finish_reason": 3}], "line 1: finish_reason is a number, expected text"),
    ([{**ROW, "finish_reason": "zonk"}], "line 1: the finish reason 'zonk' is unknown"),
    ([{**ROW, "tools": ["f"]}], r"no rows that can be used \(1 left out, the row has tools"),
    ([], "no rows, expected scored completions"),
])  # fmt: skip
def test_a_bad_row_is_named(tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        import_scored([jsonl(tmp_path / "bad.jsonl", rows)], tmp_path / "out")


def test_a_completion_cut_by_another_tool_is_cut_here(tmp_path):
    rows = [
        {**ROW, "score": n, "finish_reason": reason} for n, reason in enumerate(("stop", "eos", "max_tokens"))
    ]
    import_scored(
        [jsonl(tmp_path / "x.jsonl", [*rows, {**ROW, "finish_reason": "safety"}])], tmp_path / "out"
    )
    assert shards.read_table(tmp_path / "out/sample")["finish_reason"].to_list() == ["stop", "stop", "length"]
    assert shards.read_dropped(tmp_path / "out/sample")["reason"].to_list() == [
        "the completion ended with 'safety'"
    ]


def test_a_key_that_is_there_twice_is_named(tmp_path):
    rows = [{**ROW, "sample_id": 0}, {**ROW, "sample_id": 0, "completion": "Or so."}]
    with pytest.raises(UserError, match="prompt_id 'a', language 'en', sample_id 0 occurs more than once"):
        pairs_of_files(
            [jsonl(tmp_path / "twice.jsonl", rows)], tmp_path / "out", [], None, [], "preference", "mit"
        )


def test_the_export_refuses_what_it_cannot_write(tmp_path):
    out = made(tmp_path, "prompt-completion")

    def export(to: Path, form: str = "preference") -> None:
        with running_in(to, Runtime()) as make:
            make(export_node(out / "pairs", to, form))

    with pytest.raises(StaleStage, match="format: prompt-completion → preference"):
        export(out / "export")
    with pytest.raises(UserError, match=r"holds 'scored\.jsonl' and no stage\.json: croco has not made it"):
        export(tmp_path)
    with pytest.raises(UserError, match="no rejected completion"):
        export(tmp_path / "new")
    with pytest.raises(UserError, match="'csv' is unknown"):
        export(tmp_path / "new", "csv")


@pytest.mark.slow
def test_the_command_says_what_it_made_and_can_be_run_again(tmp_path):
    source = jsonl(tmp_path / "scored.jsonl", published())
    command = [sys.executable, "-m", "croco", "pairs", str(source), "--to", str(tmp_path / "out")]
    command += [part for text in COLUMNS for part in ("--column", text)]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1].startswith("12 rows in ")
    other = subprocess.run([*command, "--set", "pool=all"], capture_output=True, text=True, check=False)
    assert other.returncode != 0
    assert "pool: language → all" in other.stderr
    assert "--rebuild" in other.stderr
    done = subprocess.run(
        [*command, "--set", "pool=all", "--rebuild"], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1].startswith("6 rows in ")
    bad = subprocess.run([*command, "--set", "pool=nordic"], capture_output=True, text=True, check=False)
    assert bad.returncode == 2
    assert "arms.pairs.pool" in bad.stderr


def test_a_card_names_no_folder_of_the_machine(tmp_path, tiny_models):
    facts = facts_of(load(write_recipe(tmp_path, tiny_models)), "monolingual")
    assert facts["policy"] == "policy"
    assert facts["prompts"] == tiny_models.prompts.name
    assert not any(str(tmp_path.parent) in value or "/" in value for value in facts.values())


def test_languages_that_are_parallel_by_line(tmp_path):
    """Scored files as authors publish them: a file per language, ids that say nothing."""

    def row(language: str, line: int) -> dict:
        scored = [
            {"completion": f"{language}: {line} and {s}", "score": float((s + line) % 4)} for s in range(4)
        ]
        return {"id": None, "prompt": f"{language}: question {line}", "completions": scored}

    for code, num in (("da", 5), ("en", 5), ("nl", 4)):
        jsonl(tmp_path / f"{code}.jsonl", [row(code, line) for line in range(num)])
    files = [tmp_path / "da.jsonl", tmp_path / "en.jsonl"]
    given = ([], "file", ["pool=all"], "preference", "mit", "line")
    assert pairs_of_files(files, tmp_path / "out", *given) == 5
    pairs = shards.read_table(tmp_path / "out" / "pairs")
    assert pairs["prompt_id"].to_list() == [f"{line:07d}" for line in range(1, 6)]
    assert pairs["pool_size"].to_list() == [8] * 5
    ends = pairs.select(
        pl.col("chosen").str.extract(r": (\d)"), pl.col("messages").list.last().struct.field("content")
    )
    assert all(prompt.endswith(f"question {line}") for line, prompt in ends.rows())
    with pytest.raises(
        UserError, match="parallel by line, and there are 5 in da, 4 in nl: expected equally many"
    ):
        pairs_of_files([files[0], tmp_path / "nl.jsonl"], tmp_path / "new", *given)
    with pytest.raises(UserError, match=r"scored.jsonl: 'scored' is no BCP-47 language code"):
        pairs_of_files([files[0].rename(tmp_path / "scored.jsonl")], tmp_path / "other", *given)


def test_pairs_of_a_table_are_written_for_trainers(tmp_path):
    import croco

    table = pl.DataFrame(
        [
            {"prompt_id": p, "language": "da", "prompt": f"Hvorfor {p}?", "completion": f"{p} {s}", "score": float(s)}
            for p in range(3) for s in range(4)
        ]
    )  # fmt: skip
    pairs, dropped = croco.pairs(table)
    assert croco.export(pairs, str(tmp_path / "out"), dropped=dropped, license="mit") == 3
    rows = pl.read_parquet(tmp_path / "out/data/*.parquet").to_dicts()
    assert rows[1]["prompt"] == [{"role": "user", "content": "Hvorfor 1?"}]
    assert rows[1]["chosen"] == [{"role": "assistant", "content": "1 3"}]
    assert 'license: "mit"' in (tmp_path / "out/README.md").read_text()
    best, _ = croco.pairs(table, rejected="none")
    assert croco.export(best, tmp_path / "sft", "prompt-completion") == 3
    with pytest.raises(UserError, match="is not empty"):
        croco.export(pairs, tmp_path / "out")
    with pytest.raises(UserError, match="scores with a column `messages` or `prompt`"):
        croco.export(pairs.drop("messages"), tmp_path / "new")


def test_only_what_changed_is_made_again_and_nothing_of_a_person_s_goes(tmp_path):
    out = made(tmp_path)
    imported, paired = (records.read_record(out / name) for name in ("", "pairs"))
    made(tmp_path)
    assert [records.read_record(out / name) for name in ("", "pairs")] == [imported, paired]
    made(tmp_path, overrides=["rejected=min"], rebuild=True)
    assert records.read_record(out) == imported
    assert records.read_record(out / "pairs")["fingerprint"] != paired["fingerprint"]
    made(tmp_path, columns=[*COLUMNS[:2], "score=reward", "sample_id=nothing"], rebuild=True)
    assert records.read_record(out)["fingerprint"] != imported["fingerprint"]
    (out / "prompts" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"notes\.txt was not made by croco"):
        made(tmp_path)
