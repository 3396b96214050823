"""A finished run made of invented numbers and what a real model said, written through the store: what the report's
tests and its author look at.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

import real
from croco.stages.evaluate.results import language_groups, summarise
from croco.stages.pair.api import pairs
from croco.storage import files, shards
from croco.storage.schemas import (
    COMPARISONS,
    COMPLETIONS,
    PAIRS,
    PROMPTS,
    RESULTS,
    SCORES,
    VERDICTS,
    Table,
    ledger,
)

TUNED, LOW, HELD = ["en", "da", "nl", "de", "fr", "it", "es"], ["gl", "cy", "mt", "ga"], ["nb", "sv", "pt"]
MODES = ["good", "careful-wrong", "terse", "rambling", "wrong-language", "evasive", "malformed"]
MIX = {
    "base": [0.24, 0.04, 0.30, 0.15, 0.18, 0.07, 0.02],
    "monolingual": [0.57, 0.06, 0.13, 0.05, 0.16, 0.02, 0.01],
    "multilingual": [0.52, 0.05, 0.14, 0.06, 0.19, 0.03, 0.01],
}
NASTY = "<script>document.title='owned'</script></script><!-- & \u2028 \"quoted\" 'text'"

SAID = {code: texts["completion"].to_list() for (code,), texts in real.completions().group_by("language")}

ARENA = {
    "win-rate": 0.64, "lc-win-rate": 0.61, "tie": 0.2, "self-consistency": 0.8, "position-bias": -0.03,
    "win-rate:sum": 0.64, "win-rate-p-holm": 0.004,
}  # fmt: skip


def make_run(
    folder: Path, num_prompts: int = 40, num_samples: int = 16, num_tests: int = 60, seed: int = 0
) -> Path:
    """Write prompts, completions, scores, pairs, metrics and results under `folder`; returns it."""
    rng = np.random.default_rng(seed)
    recipe = {
        "run": {
            "name": "made",
            "languages": TUNED,
            "low_resource_languages": LOW,
            "held_out_languages": HELD,
        },
        "sampling": {"completions": num_samples, "max_new_tokens": 48},
        "evaluation": {"temperatures": [0.0, 1.0], "base_temperatures": [0.4]},
        "arms": {
            "monolingual": {"pool": "language"},
            "multilingual": {"pool": "all", "training": {"beta": 0.2}},
        },
    }
    files.write_json(folder / "recipe.json", recipe)
    keys = [(f"sum.{i}", code) for i in range(num_prompts) for code in TUNED]
    prompts = [
        {
            "prompt_id": p,
            "language": c,
            "messages": [{"role": "user", "content": f"{c}: what is {p} & <b>why</b>?"}],
            "reference": None,
            "source": "made",
            "domain": "sum",
        }
        for p, c in keys
    ]
    write(folder / "prompts", PROMPTS, prompts)
    samples = [(p, c, s) for p, c in keys for s in range(num_samples)]
    scores = rng.normal(size=len(samples)).astype(np.float32) + np.array(
        [TUNED.index(c) / 5 for _, c, _ in samples]
    )
    completions = [
        {
            "prompt_id": p,
            "language": c,
            "sample_id": s,
            "completion": said(p, c, s),
            "completion_ids": None,
            "completion_tokens": 8,
            "finish_reason": "stop",
            "policy": "made",
            "seed": s,
        }
        for p, c, s in samples
    ]
    write(folder / "sample", COMPLETIONS, completions, facts={"device": "cpu"})
    write(
        folder / "score",
        SCORES,
        [
            {"prompt_id": p, "language": c, "sample_id": s, "score": float(score), "scorer": "made"}
            for (p, c, s), score in zip(samples, scores, strict=True)
        ],
    )
    for arm, pool in (("monolingual", "language"), ("multilingual", "all")):
        _pairs(folder, arm, pool, samples, scores)
        _training(folder / "train" / arm, rng)
    _results(folder, rng, num_tests)
    return folder


def said(prompt_id: str, language: str, sample_id: int) -> str:
    """What a real model said in the language, to other prompts."""
    texts = SAID[language]
    return texts[(7 * int(prompt_id.removeprefix("sum.")) + sample_id) % len(texts)]


def add_arena(folder: Path, num_prompts: int = 30, seed: int = 1) -> None:
    """Judged comparisons of both arms, their win rates and one structured task, as an arena and EuroEval leave them."""
    rng = np.random.default_rng(seed)
    for arm in ("monolingual", "multilingual"):
        rows = []
        for number in range(num_prompts):
            for language in TUNED:
                first, second = rng.choice(["arm", "base", "tie"], size=2, p=[0.6, 0.2, 0.2])
                rows.append(
                    {
                        "arm": arm, "prompt_id": f"t{number}", "language": language, "domain": "sum",
                        "completion": f"Tuned completion {number} in {language}.",
                        "base_completion": NASTY if number == 0 else f"Base completion {number}.",
                        "verdict_arm_first": first, "verdict_base_first": second,
                        "judgement_arm_first": f"Verdict: {first}", "judgement_base_first": f"Verdict: {second}",
                        "value": {"arm": 1.0, "base": 0.0}.get(first, 0.5) if first == second else 0.5,
                        "judge": "made", "judge_prompt_tokens": 90, "judge_completion_tokens": 9,
                    }
                )  # fmt: skip
        write(folder / "arena" / arm, COMPARISONS, rows, facts={"comparisons": len(rows), "inconsistent": 9})
    added = []
    for place, arm in enumerate(("monolingual", "multilingual")):
        for scope in ["tuned", "all", *TUNED]:
            for metric, value in ARENA.items():
                value = value - 0.1 * place if metric.startswith(("win", "lc")) else value
                added.append((arm, scope, "arena", metric, value, value - 0.06, value + 0.06))
    for place, arm in enumerate(("base", "monolingual", "multilingual")):
        added += [(arm, scope, "lab", "right-language", 0.9, 0.88, 0.92) for scope in ("tuned", "held-out")]
        added.append((arm, "da", "scala-da", "test_mcc", 20.5 + place, 18.0 + place, 23.0 + place))
    rows = [
        {"arm": arm, "language": scope, "benchmark": benchmark, "metric": metric, "temperature": 0.0,
         "value": value, "ci_low": low, "ci_high": high, "n": num_prompts, "seed": 0}
        for arm, scope, benchmark, metric, value, low, high in added
    ]  # fmt: skip
    write(folder / "results", RESULTS, shards.read_table(folder / "results").to_dicts() + rows)


def add_sentinel(folder: Path) -> None:
    """Two marks in one arm's training curve."""
    path = folder / "train" / "multilingual" / "metrics.jsonl"
    marks = [
        {"step": 12, "split": "stopped", "reason": "the reward of chosen falls below that of the start"},
        {"step": 31, "split": "stopped", "reason": "the mean length of sampled completions doubled"},
    ]
    files.write_text(path, path.read_text() + "".join(json.dumps(mark) + "\n" for mark in marks))


def _pairs(folder: Path, arm: str, pool: str, samples: list, scores: np.ndarray) -> None:
    table = pl.DataFrame(samples, schema=["prompt_id", "language", "sample_id"], orient="row")
    found, _ = pairs(table.with_columns(score=pl.Series(scores, dtype=pl.Float32)), pool=pool)
    rows = [
        row
        | {
            "arm": arm,
            "messages": [
                {"role": "user", "content": f"{row['language']}: what is {row['prompt_id']} & <b>why</b>?"}
            ],
            "chosen": said(row["prompt_id"], row["chosen_language"], row["chosen_sample_id"])
            if number
            else NASTY,
            "rejected": said(row["prompt_id"], row["rejected_language"], row["rejected_sample_id"]),
            "chosen_finish_reason": "stop",
            "rejected_finish_reason": "stop",
        }
        for number, row in enumerate(found.iter_rows(named=True))
    ]
    drops = [
        ("completion", "sum.1", "da", 2, "cut at the token limit"),
        ("completion", "sum.1", "nl", 2, "cut at the token limit"),
        ("completion", "sum.0", "nl", 1, "duplicate of an earlier completion: of sample 0"),
        ("flag", "sum.0", "da", 1, "rejected: wrong language"),
    ]
    counts = {
        "read": {"completion": len(samples), "pool": len(rows)},
        "written": {"pair": len(rows), "completion": len(samples) - 3, "pool": len(rows)},
        "dropped": {"completion": 3, "flag": 1},
    }
    facts = {
        "completions": len(samples),
        "candidates": len(samples) - 3,
        "pools": len(rows),
        "pairs": len(rows),
        "median_pool_size": int(found["pool_size"].median()),
        "share_other_than_minimum": 0.04,
    }
    write(folder / "pair" / arm, PAIRS, rows, ledger(drops), facts, counts)


def _training(folder: Path, rng: np.random.Generator) -> None:
    lines = []
    for step in range(1, 41):
        done = step / 40
        lines.append(
            {
                "step": step,
                "split": "train",
                "loss": 0.69 - 0.35 * done + 0.03 * rng.normal(),
                "rewards/chosen": 0.5 * done,
                "rewards/rejected": -2 * done,
                "rewards/margins": 2.5 * done + 0.1 * rng.normal(),
                "rewards/accuracies": 0.5 + 0.45 * done,
                "logps/chosen": -12 + 2 * done,
                "logps/rejected": -9 - 14 * done,
                "learning_rate": 1e-3 * (1 - done),
            }
        )
    files.write_text(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    stage_json(folder, {"read": {"pair": 280}, "written": {"pair": 280}, "dropped": {}}, {"steps": 40})


def _results(folder: Path, rng: np.random.Generator, num_tests: int) -> None:
    rows = []
    for arm, mix in MIX.items():
        for temperature in (0.0, 1.0) + ((0.4,) if arm == "base" else ()):
            for language in TUNED + LOW + HELD:
                share = np.array(mix)
                lift = {0.0: 0.12, 0.4: 0.1}.get(temperature, 0.0) - (0.18 if language in LOW else 0.0)
                share[0] = max(0.02, share[0] + lift)
                modes = rng.choice(MODES, size=num_tests, p=share / share.sum())
                rows += [
                    (
                        arm,
                        f"t{i}",
                        language,
                        temperature,
                        0,
                        m,
                        "lab" if i % 4 else "lab-held-out-task",
                        float(m == "good"),
                    )
                    for i, m in enumerate(modes)
                ]
    names = ["arm", "prompt_id", "language", "temperature", "sample_id", "mode", "benchmark", "value"]
    table = summarise(
        pl.DataFrame(rows, schema=names, orient="row"), language_groups(TUNED, LOW, HELD), 0, 400
    )
    write(folder / "results", RESULTS, table.to_dicts())
    _verdicts(folder, rows)


def _verdicts(folder: Path, rows: list[tuple]) -> None:
    """The evaluated completions that the results were made of, and their prompts."""
    names = sorted({(row[1], row[2]) for row in rows})
    prompts = [
        {
            "prompt_id": name,
            "language": code,
            "messages": [{"role": "user", "content": f"{code}: test {name}?"}],
            "reference": None,
            "source": "made",
            "domain": None,
        }
        for name, code in names
    ]
    write(folder / "eval-prompts", PROMPTS, prompts)
    keys = ["arm", "prompt_id", "language", "temperature", "sample_id", "mode", "benchmark", "value"]
    for arm in MIX:
        own = [dict(zip(keys, row, strict=True)) for row in rows if row[0] == arm]
        for row in own:
            row |= {"completion": f"A completion of {arm}, {row['mode']}.", "finish_reason": "stop"}
        write(folder / "evaluate" / arm, VERDICTS, own)


def write(
    folder: Path,
    table: Table,
    rows: list[dict],
    dropped: pa.Table | None = None,
    facts: Any = None,
    counts: Any = None,
) -> None:
    """A stage's folder with one finished shard and a stage.json."""
    drops = shards.count_units(dropped) if dropped is not None else {}
    counts = counts or {"read": {table.unit: len(rows)}, "written": {table.unit: len(rows)}, "dropped": drops}
    shards.write_shard(
        folder,
        0,
        pa.Table.from_pylist(rows, schema=table.schema),
        table.schema,
        read=counts["read"],
        written=counts["written"],
        dropped=dropped,
    )
    shards.merge_ledgers(folder)
    stage_json(folder, counts, facts or {})


def stage_json(folder: Path, counts: dict, facts: dict) -> None:
    files.write_json(
        folder / "stage.json",
        {
            "stage": folder.name,
            "arm": None,
            "state": "complete",
            "fingerprint": "0123456789abcdef",
            "science": {"name": folder.name, "version": 1, "arm": None, "settings": {}, "inputs": {}},
            "shard_prompts": 64,
            "num_shards": 1,
            "counts": counts,
            "seconds": 12.3,
            "starts": 1,
            "facts": facts,
            "commit": "abc123",
            "libraries": {"python": "3.11", "torch": "2.13.0"},
            "machine": "Linux x86_64",
            "time": "2026-11-23T08:00:00+00:00",
        },
    )
