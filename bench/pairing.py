"""Pairs at scale: selection on fourteen million scores, and the whole stage against its obvious twin, in one run.

    OMP_NUM_THREADS=1 python bench/pairing.py [--millions 1 4 14] [--rounds 3] [--folder FOLDER]

Made-up data of the real shape: 11 languages, 64 completions a prompt and language, about 1 KB each, words drawn by
Zipf's law; one in fifty is cut, one in a hundred repeats an earlier one, one in a hundred but for case and white space.
Selection is `croco.pairs` on a table in memory. The stage reads Parquet and writes Parquet; its twin reads the same
completions as JSON lines, one by one, into dicts, guards and selects pool by pool with numpy, and writes JSON lines.
Both have the same guards and must give the same pairs; the language guard is off in both (0.3 ms a text).
Every run is a process of its own; memory is its peak. 14 million rows take about 9 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any, TextIO

import numpy as np
import pyarrow as pa

LANGUAGES = sorted(["da", "nl", "en", "fr", "de", "it", "es", "gl", "ga", "mt", "cy"])
COMPLETIONS, SHARD_PROMPTS = 64, 64
PROMPTS_OF_THE_PAPER = 20_000


def peak_bytes() -> int:
    """The most memory that this process has held."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    [line] = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


# data -------------------------------------------------------------------------------------------------------


def corpus(rng: np.random.Generator, megabytes: int = 64) -> str:
    """Words of a made-up language, drawn by Zipf's law."""
    letters = np.array(list("etaoinshrdlcumwfgypbvkjxqzæøåéü"))
    words = np.array(["".join(rng.choice(letters, rng.integers(2, 11))) for _ in range(30_000)])
    return " ".join(words[np.minimum(rng.zipf(1.25, megabytes * 150_000), len(words)) - 1])


def generate(folder: Path, millions: int, lines: bool) -> None:
    """The tables prompts, sample and score of so many million completions; with `lines`, the same as JSON lines."""
    from croco.storage import shards
    from croco.storage.schemas import COMPLETIONS as COMPLETIONS_TABLE
    from croco.storage.schemas import PROMPTS, SCORES

    rng = np.random.default_rng(millions)
    text = corpus(rng)
    pools = [
        (f"prompt-{p:06d}", language)
        for p in range(-(-millions * 10**6 // (COMPLETIONS * len(LANGUAGES))))
        for language in LANGUAGES
    ]
    out = (folder / "completions.jsonl").open("w", encoding="utf-8") if lines else None
    for shard, start in enumerate(range(0, len(pools), SHARD_PROMPTS)):
        made = made_up(rng, text, pools[start : start + SHARD_PROMPTS])
        for name, table in (("prompts", PROMPTS), ("sample", COMPLETIONS_TABLE), ("score", SCORES)):
            counts = {table.unit: made[name].num_rows}
            columns = made[name].select(table.schema.names)
            shards.write_shard(
                folder / name, shard, columns, table.schema, read=counts, written=counts, dropped=None
            )
        if out is not None:
            write_lines(out, made)
    for name in ("prompts", "sample", "score"):
        shards.merge_ledgers(folder / name)
    if out is not None:
        out.close()


def made_up(rng: np.random.Generator, text: str, pools: list[tuple[str, str]]) -> dict[str, pa.Table]:
    """Prompts, completions and scores of some (prompt_id, language)."""
    from croco.storage.schemas import PROMPTS

    prompts = [
        {
            "prompt_id": p, "language": code, "reference": None, "source": "made", "domain": None,
            "messages": [{"role": "user", "content": f"{p} {code}: {text[i * 97 : i * 97 + 300]}"}],
        }
        for i, (p, code) in enumerate(pools)
    ]  # fmt: skip
    num = len(pools) * COMPLETIONS
    at, size = rng.integers(0, len(text) - 2000, num), rng.integers(600, 1400, num)
    texts = [text[a : a + s] for a, s in zip(at.tolist(), size.tolist(), strict=True)]
    for row in np.flatnonzero(rng.random(num) < 0.02).tolist():
        if row % COMPLETIONS:
            texts[row] = texts[row - 1] if row % 2 else f"  {texts[row - 1].upper()}"
    score = rng.normal(size=num).astype(np.float32)
    keys = {
        "prompt_id": [p for p, _ in pools for _ in range(COMPLETIONS)],
        "language": [code for _, code in pools for _ in range(COMPLETIONS)],
        "sample_id": pa.array(list(range(COMPLETIONS)) * len(pools), pa.int32()),
    }
    rest = {
        "completion": texts, "completion_ids": pa.nulls(num, pa.list_(pa.int32())),
        "completion_tokens": [250] * num, "prompt_tokens": [80] * num,
        "finish_reason": np.where(rng.random(num) < 0.02, "length", "stop").tolist(),
        "policy": ["made"] * num, "seed": list(range(num)),
    }  # fmt: skip
    scores = pa.table({**keys, "score": score, "scorer": ["made"] * num})
    return {
        "prompts": pa.Table.from_pylist(prompts, schema=PROMPTS.schema),
        "sample": pa.table({**keys, **rest}),
        "score": scores.append_column("parts", pa.nulls(num)),
    }


def write_lines(out: TextIO, made: dict[str, pa.Table]) -> None:
    """The same as JSON lines."""
    messages = made["prompts"]["messages"].to_pylist()
    columns = ["prompt_id", "language", "sample_id", "completion", "finish_reason"]
    rows = made["sample"].select(columns).to_pylist()
    for number, (row, score) in enumerate(zip(rows, made["score"]["score"].to_pylist(), strict=True)):
        line = row | {"messages": messages[number // COMPLETIONS], "score": score}
        out.write(json.dumps(line, ensure_ascii=False) + "\n")


# what is measured -------------------------------------------------------------------------------------------


def stage(folder: Path, pool: str) -> dict[str, Any]:
    """The stage `pair`, as a run calls it."""
    from croco.config.load import from_dict
    from croco.pipeline.fingerprint import pair_settings
    from croco.pipeline.stage import Work
    from croco.stages.pair.pair import pair
    from croco.storage.schemas import TABLES

    arms = {"arm": {"pool": pool, "guards": {"wrong_language": "off"}}}
    recipe = from_dict({"run": {"name": "bench", "languages": LANGUAGES}, "arms": arms})
    shutil.rmtree(folder / "pair", ignore_errors=True)
    work = Work(
        arm="arm", folder=folder / "pair", settings=pair_settings(recipe, "arm"),
        inputs={name: folder / name for name in ("prompts", "sample", "score")}, table=TABLES["pairs"],
        runtime=recipe.runtime, title="pair",
    )  # fmt: skip
    began = time.perf_counter()
    pair(work)
    return {"seconds": time.perf_counter() - began, "processor": time.process_time(), "peak": peak_bytes()}


def twin(folder: Path, pool: str) -> dict[str, Any]:
    """The obvious way."""
    began = time.perf_counter()
    pools: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    with (folder / "completions.jsonl").open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            key = (row["prompt_id"],) if pool == "all" else (row["prompt_id"], row["language"])
            pools.setdefault(key, []).append(row)
    with (folder / "twin.jsonl").open("w", encoding="utf-8") as out:
        for rows in pools.values():
            kept, seen, normal = [], set(), set()
            for row in rows:
                text, folded = row["completion"], " ".join(row["completion"].lower().split())
                mine = (row["language"], text), (row["language"], folded)
                if not text.strip() or row["finish_reason"] == "length" or mine[0] in seen:
                    continue
                seen.add(mine[0])
                if mine[1] in normal:
                    continue
                normal.add(mine[1])
                kept.append(row)
            scores = np.array([row["score"] for row in kept])
            best = int(np.argmax(scores))
            distance = np.abs(scores - (scores.mean() - 2 * scores.std()))
            distance[scores >= scores[best]] = np.inf
            worst = int(np.argmin(distance))
            if np.isfinite(distance[worst]):
                pair = {
                    "prompt_id": kept[best]["prompt_id"], "language": kept[best]["language"],
                    "messages": kept[best]["messages"], "chosen": kept[best]["completion"],
                    "rejected": kept[worst]["completion"], "chosen_sample_id": kept[best]["sample_id"],
                    "rejected_sample_id": kept[worst]["sample_id"], "rejected_language": kept[worst]["language"],
                }  # fmt: skip
                out.write(json.dumps(pair, ensure_ascii=False) + "\n")
    return {"seconds": time.perf_counter() - began, "processor": time.process_time(), "peak": peak_bytes()}


def selection(pool: str, shuffled: bool) -> dict[str, Any]:
    """`croco.pairs` on the scores of the paper's run; the peak holds the table itself."""
    import polars as pl

    import croco

    num = PROMPTS_OF_THE_PAPER * len(LANGUAGES) * COMPLETIONS
    prompt, rest = np.divmod(np.arange(num), len(LANGUAGES) * COMPLETIONS)
    names = pl.Series([f"prompt-{p:06d}" for p in range(PROMPTS_OF_THE_PAPER)])
    table = pl.DataFrame(
        {
            "prompt_id": names.gather(pl.Series(prompt.astype(np.uint32))),
            "language": pl.Series(LANGUAGES).gather(pl.Series((rest // COMPLETIONS).astype(np.uint32))),
            "sample_id": (rest % COMPLETIONS).astype(np.int32),
            "score": np.random.default_rng(0).normal(size=num).astype(np.float32),
        }
    )
    del prompt, rest
    if shuffled:
        table = table.sample(fraction=1.0, shuffle=True, seed=0)
    before, size = peak_bytes(), table.estimated_size()
    began = time.perf_counter()
    pairs, _ = croco.pairs(table, pool=pool)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "peak": peak_bytes(), "before": before, "table": size, "pairs": pairs.height}


def same_pairs(folder: Path) -> int:
    """How many pairs both sides gave; raises AssertionError when they are not the same."""
    from croco.storage.shards import read_table

    columns = [
        "prompt_id",
        "language",
        "rejected_language",
        "chosen_sample_id",
        "rejected_sample_id",
        "chosen",
        "rejected",
    ]
    ours = read_table(folder / "pair", columns).rows()
    with (folder / "twin.jsonl").open(encoding="utf-8") as file:
        theirs = [tuple(json.loads(line)[name] for name in columns) for line in file]
    assert sorted(ours) == sorted(theirs), "the stage and its twin give other pairs"
    return len(ours)


def alone(name: str, *arguments: object) -> dict[str, Any]:
    """Run one of the functions above in a process of its own."""
    command = [sys.executable, __file__, "--run", name, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--millions", type=int, nargs="+", default=[1, 4, 14])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--run", nargs="+")
    asked = parser.parse_args()
    if asked.run:
        name, *rest = asked.run
        if name == "selection":
            print(json.dumps(selection(rest[0], rest[1] == "True")))
        else:
            print(json.dumps({"stage": stage, "twin": twin}[name](Path(rest[0]), rest[1])))
        return
    num = PROMPTS_OF_THE_PAPER * len(LANGUAGES) * COMPLETIONS
    for pool, shuffled in (("language", False), ("all", False), ("language", True)):
        runs = [alone("selection", pool, shuffled) for _ in range(asked.rounds)]
        seconds, peak = median(r["seconds"] for r in runs), median(r["peak"] for r in runs)
        print(
            f"selection of {num / 1e6:.2f} M scores, pool {pool}{', shuffled rows' if shuffled else ''}: "
            f"{seconds:.1f} s, peak {peak / 1e9:.2f} GB, of which {runs[0]['table'] / 1e9:.2f} GB are the table "
            f"({runs[0]['pairs']:,} pairs)",
            flush=True,
        )
    with tempfile.TemporaryDirectory(dir=asked.folder) as made:
        for millions in asked.millions:
            folder = Path(made) / f"{millions}m"
            first = millions == min(asked.millions)
            generate(folder, millions, lines=first) if not folder.mkdir() else None
            for pool in ("language", "all"):
                ours, theirs = [], []
                for _ in range(asked.rounds if first else 1):
                    ours.append(alone("stage", folder, pool))
                    if first:
                        theirs.append(alone("twin", folder, pool))
                mine, held = median(r["seconds"] for r in ours), median(r["peak"] for r in ours)
                line = f"stage, {millions} M completions, pool {pool}: {mine:.1f} s, peak {held / 1e9:.2f} GB"
                if first:
                    its, its_peak = median(r["seconds"] for r in theirs), median(r["peak"] for r in theirs)
                    line += (
                        f"; twin {its:.1f} s, {its_peak / 1e9:.2f} GB: {its / mine:.1f} × faster, "
                        f"{held / its_peak:.1%} of its memory, the same {same_pairs(folder):,} pairs"
                    )
                print(line, flush=True)
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
