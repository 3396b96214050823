"""A stage and a node: one step of the pipeline, and that step for one arm with the fingerprints of what it reads.

Building them runs nothing and imports no stage. Which stages there are is `graph.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from croco.config.recipe import Recipe
from croco.storage.hashing import digest
from croco.storage.records import Record, Science

Settings = dict[str, Any]  # JSON values; `Given` where a stage needs more than its fingerprint holds
Reference = tuple[str, str | None]  # a stage's name and its arm


@dataclass(frozen=True)
class Given:
    """A setting of which the fingerprint holds an identity: a model's path, say, and the digest of its weights."""

    value: Any  # what the stage's function gets
    identity: Any  # JSON


def settings_values(settings: Settings) -> Settings:
    """Settings as a stage's function gets them."""
    return {name: value.value if isinstance(value, Given) else value for name, value in settings.items()}


@dataclass(frozen=True, repr=False)
class Stage:
    """One step of the pipeline."""

    name: str  # its folder and its command
    version: int  # raised when what the function computes changes meaning
    function: str  # "croco.stages.sample:sample", imported when it runs
    table: str  # a name of schemas.TABLES, or "" when it writes no table
    # the resolved values that change its tables, and the stages it reads
    settings: Callable[[Recipe, str | None], Settings] = lambda recipe, arm: {}
    inputs: Callable[[Recipe, str | None], list[Reference]] = lambda recipe, arm: []
    # one run per arm, or [None] for one shared run
    arms: Callable[[Recipe], list[str | None]] = lambda recipe: [None]
    reads_all: tuple[str, str] | None = None  # (unit, stage): it must account for every row of that input
    added: tuple[str, ...] = ()  # settings that the records of earlier versions lack
    check: str = ""  # like `function`: called with (recipe, say) before anything runs; may raise UserError
    gives: tuple[str, ...] = ()  # folders of `makes` that are tables, which others read by these names
    makes: tuple[str, ...] = ()  # files and folders of its own in its folder, beside shards and ledger

    def __repr__(self) -> str:
        return f"Stage({self.name})"


@dataclass(frozen=True, eq=False, repr=False)
class Node:
    """A stage for one arm, or shared (arm None), with the fingerprints of what it reads."""

    stage: Stage
    arm: str | None
    folder: Path
    settings: Settings
    inputs: Mapping[str, Node]
    not_recorded: tuple[str, ...] = ()  # settings that its record, of an earlier version, lacks

    def __repr__(self) -> str:
        return f"Node({self.title} in {self.folder})"

    @property
    def title(self) -> str:
        return self.stage.name if self.arm is None else f"{self.stage.name}/{self.arm}"

    @cached_property
    def science(self) -> Science:
        """What the fingerprint is the digest of."""
        return {
            "name": self.stage.name,
            "version": self.stage.version,
            "arm": self.arm,
            "settings": {
                name: value.identity if isinstance(value, Given) else value
                for name, value in self.settings.items()
                if name not in self.not_recorded
            },
            "inputs": {name: node.fingerprint for name, node in self.inputs.items()},
        }

    @cached_property
    def fingerprint(self) -> str:
        return digest(self.science)


def new_record(
    node: Node, shard_prompts: int = 1, state: Literal["running", "removed"] = "running"
) -> Record:
    """The record of a stage that begins, or of one that is being removed."""
    return {
        "stage": node.stage.name,
        "arm": node.arm,
        "state": state,
        "fingerprint": node.fingerprint,
        "science": node.science,
        "shard_prompts": shard_prompts,
        "num_shards": None,
        "counts": {},
        "seconds": 0.0,
        "starts": 1,
        "facts": {},
    }
