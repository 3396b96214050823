"""What a stage says of itself: its `stage.json` and the markers of its shards, read with the shape they must have."""

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, cast

import pydantic
from typing_extensions import TypedDict

from croco.errors import UserError
from croco.storage.files import RECORD, read_json, write_json

Counts = dict[str, pydantic.NonNegativeInt]


@pydantic.with_config(pydantic.ConfigDict(extra="allow", strict=True))
class Science(TypedDict):
    """What a fingerprint is the digest of."""

    name: str
    version: int
    arm: str | None
    settings: dict[str, Any]
    inputs: dict[str, str]


@pydantic.with_config(pydantic.ConfigDict(extra="allow", strict=True))
class Record(TypedDict):
    """A stage's `stage.json`; further keys say where and with what it was made."""

    stage: str
    arm: str | None
    state: Literal["running", "complete", "removed"]
    fingerprint: str
    science: Science
    shard_prompts: Annotated[pydantic.PositiveInt, pydantic.Field(le=10**15)]
    num_shards: pydantic.NonNegativeInt | None
    counts: dict[str, Counts]
    seconds: pydantic.NonNegativeFloat
    starts: pydantic.PositiveInt
    facts: dict[str, Any]
    files: NotRequired[Counts]  # of a stage without a table: names and sizes
    digests: NotRequired[dict[str, str]]  # of these files, or of the ledger
    commit: NotRequired[str | None]
    libraries: NotRequired[dict[str, str]]
    machine: NotRequired[str]


@pydantic.with_config(pydantic.ConfigDict(strict=True))
class Marker(TypedDict):
    """A finished shard's marker; those of earlier versions have no digests."""

    rows: pydantic.NonNegativeInt
    read: Counts
    written: Counts
    dropped: Counts
    digests: NotRequired[dict[str, str]]


_RECORD, _MARKER = pydantic.TypeAdapter(Record), pydantic.TypeAdapter(Marker)


def _read_shaped(path: Path, shape: pydantic.TypeAdapter[Any], name: str) -> Any:
    """A JSON file of a known shape, as we write them; raises UserError naming the first key that is off."""
    value = read_json(path)
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
        return shape.validate_python(value)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        where = f" at '{key}'" if key else ""
        raise UserError(f"{path} is no {name}{where}: {first['msg'].lower()}") from None
    except (ValueError, RecursionError) as error:  # a number that is not finite, half a surrogate pair
        raise UserError(f"{path} is no {name}: {error}") from None


def read_record(folder: Path) -> Record:
    """A stage's `stage.json`; raises UserError when it is missing or not the record of a stage."""
    return cast(Record, _read_shaped(folder / RECORD, _RECORD, "record of a stage"))


def write_record(folder: Path, record: Record) -> None:
    """Write a stage's `stage.json`."""
    write_json(folder / RECORD, record)


def state(folder: Path) -> str:
    """ "complete", "running", or "missing" for a folder without a stage; raises UserError as `read_record`."""
    if not os.path.lexists(folder / RECORD):
        return "missing"
    recorded = read_record(folder)["state"]
    return "missing" if recorded == "removed" else recorded


def read_marker(path: Path) -> Marker:
    """The marker of a shard; raises UserError when it is damaged."""
    return cast(Marker, _read_shaped(path, _MARKER, "marker of a shard"))
