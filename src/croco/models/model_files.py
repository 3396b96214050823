"""What a model's files say without its weights: its config, and where its completions end and its scores are read."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from traceback import extract_tb
from typing import Any

from croco.config.models import Model
from croco.errors import UserError
from croco.storage.files import read_json
from croco.storage.hashing import local_model

GENERATION_FILE = "generation_config.json"
JSON_FILES = (
    "config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    GENERATION_FILE,
    "special_tokens_map.json",
)
COUNTS = re.compile(r"(n|num)_(\w+_)?(layers?|experts?|heads?|groups?)")
MOST_COUNTED = 10_000
UNKNOWN_CONTEXT = 2**30  # tokens: of ALiBi, recurrent layers and the like


@contextmanager
def refusing(what: str, place: str | Path) -> Iterator[None]:
    """Whatever the libraries raise at a broken or foreign model becomes one sentence that begins with `what`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a model's files, and its code, may make them raise anything
        raise UserError(f"{what}: {_explained(error, Path(place))}") from error


def _explained(error: Exception, place: Path) -> str:
    """What is wrong in a line: the file that is not what its name says, the package that is missing, or the error."""
    for name in JSON_FILES:
        path = place / name
        if path.is_file() and (fault := _fault(path)) is not None:
            return f"{path} {fault}"
    line = (str(error).strip().splitlines() or [""])[0][:300]
    if isinstance(error, ImportError):
        return f"{line}; expected that package to be installed, or a model that does without it"
    line = line if isinstance(error, OSError) and line else f"{type(error).__name__} {line}".strip()
    in_config = any("configuration_" in frame.filename for frame in extract_tb(error.__traceback__))
    return f"{place / 'config.json'} is refused ({line})" if in_config and place.is_dir() else line


def _fault(path: Path) -> str | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        return f"is no JSON ({str(error).splitlines()[0][:100]}), expected a whole file"
    return None if isinstance(content, dict) else f"holds a {type(content).__name__}, expected an object"


def check_counts(place: str | Path) -> None:
    """Raise UserError for a config with more layers or experts than anyone means: building them would not end."""
    path = Path(place) / "config.json"
    if not path.is_file() or _fault(path) is not None:
        return  # a hub id; or what loads it says so
    config = json.loads(path.read_text(encoding="utf-8"))
    for part in (config, *(below for below in config.values() if isinstance(below, dict))):
        for name, count in part.items():
            if COUNTS.fullmatch(name) and isinstance(count, int) and count > MOST_COUNTED:
                raise UserError(f"{path}: {name} = {count}, expected at most {MOST_COUNTED}")


def check_weights(section_model: str, place: str | Path) -> None:
    """Raise UserError for weights outside of their folder, and for pickles, which may run code when they are read."""
    folder = Path(place)
    check_counts(folder)
    for index in sorted(folder.glob("*.safetensors.index.json")):
        names = read_json(index)
        names = names.get("weight_map") if isinstance(names, dict) else None
        for name in names.values() if isinstance(names, dict) else [names]:
            if not isinstance(name, str) or Path(name).name != name:
                raise UserError(f"{index} names the file {name!r}, expected files of this folder")
    pickles = sorted(path.name for path in folder.glob("*.bin") if path.name.startswith("pytorch_model"))
    if pickles and not any(folder.glob("*.safetensors")):
        raise UserError(
            f"model {section_model!r}: {folder / pickles[0]} is a pickle, which could run any code, expected "
            f"model.safetensors: where you trust the file, load and save the model with transformers"
        )


def load_config(section: Model, key: str) -> Any:
    """The config of a recipe's model; raises UserError naming the key."""
    from transformers import AutoConfig

    place = local_model(section.model, f"{key}.model") or section.model
    check_weights(section.model, place)
    with refusing(f"{key}.model = '{section.model}' does not load", place):
        return AutoConfig.from_pretrained(
            place, revision=section.revision, trust_remote_code=section.trust_remote_code
        )


def generation_config(section: Model) -> Any:
    """The model's generation config, or None where it has none."""
    return read_generation_config(local_model(section.model) or section.model, section.revision)


def read_generation_config(place: str | Path, revision: str | None) -> Any:
    """The generation config of a folder or hub id, or None where there is none; raises UserError for one that is not
    whole, since its end tokens would be lost."""
    from transformers import GenerationConfig
    from transformers.utils import cached_file

    options = {
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    try:
        path = cached_file(str(place), GENERATION_FILE, revision=revision, **options)
    except (OSError, ValueError):  # a repository that is not there: what loads the model says so
        return None
    if path is None:
        return None
    if (fault := _fault(Path(path))) is not None:
        raise UserError(f"{path} {fault}: it names the end tokens")
    with refusing(f"{path} does not load", place):
        return GenerationConfig.from_pretrained(place, revision=revision)


def context_of(config: Any) -> int:
    """The longest sequence in tokens that a model was made for, UNKNOWN_CONTEXT where its config does not say.
    Positions of the type "dynamic" stretch it by their factor."""
    text = config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    lengths = {name: getattr(text, name, None) for name in names}
    name, positions = next(((k, v) for k, v in lengths.items() if isinstance(v, int)), ("", UNKNOWN_CONTEXT))
    if positions <= 0:
        raise UserError(f"the model's config has {name} = {positions}, expected a number of tokens above 0")
    rope = getattr(text, "rope_parameters", None) or {}
    stretched = rope.get("factor", 1.0) if rope.get("rope_type") == "dynamic" else 1.0
    return int(positions * stretched)


def read_part(ids: Sequence[int], pad: int | None) -> list[int]:
    """The ids up to the last that is no padding, where transformers reads a score: vLLM reads it at the last of all."""
    end = next((at for at in range(len(ids), 1, -1) if ids[at - 1] != pad), 1)
    return list(ids[:end])
