"""The program that EuroEval's own Python runs: some datasets, one after the other, against one server.

It imports nothing of the package. It reads what to do as JSON from its standard input, and writes a line of JSON for
every dataset; results are in EuroEval's own file, in the working directory. EuroEval is left as it is, but for one
thing: where HF_HUB_OFFLINE is set, no public address is asked whether there is a network."""

import json
import os
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

LIBRARIES = ("euroeval", "litellm", "datasets", "evaluate", "transformers", "torch", "scikit-learn")


def main() -> None:
    """Do what standard input says."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what others print goes to the log
    asked = json.load(sys.stdin)
    libraries = {"python": sys.version.split()[0]} | {name: version(name) for name in LIBRARIES}
    say(out, libraries=libraries)
    if libraries["euroeval"] != asked["version"]:
        return
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        stay_offline()

    from euroeval import Benchmarker
    from euroeval.dataset_configs import get_all_dataset_configs
    from euroeval.enums import GenerativeType
    from euroeval.exceptions import InvalidBenchmark, InvalidModel

    cache = Path(asked["cache"])
    local = Path("custom_datasets.py")
    known = get_all_dataset_configs(local, [], None, cache, trust_remote_code=False, run_with_cli=False)
    unknown = [name for name in asked["known"] if name not in known]
    say(out, unknown=unknown)
    if unknown:
        return
    benchmarker = Benchmarker(
        progress_bar=False,
        raise_errors=True,
        cache_dir=str(cache),
        custom_datasets_file=local,
        api_key=os.environ.get("OPENAI_API_KEY"),
        api_base=asked["url"],
        evaluate_test_split=asked["split"] == "test",
        few_shot=asked["few_shot"],
        num_iterations=asked["iterations"],
        generative_type=GenerativeType(asked["generative_type"]),
        max_context_length=asked["max_context"],
    )
    for name in asked["datasets"]:
        try:
            benchmarker.benchmark(asked["model"], dataset=name)
        except (InvalidBenchmark, InvalidModel) as error:
            say(out, dataset=name, error=str(error))
        else:
            say(out, dataset=name)


def stay_offline() -> None:
    """Keep EuroEval from asking a public address whether there is a network. It is told that there is one, since
    without one it takes any model for an encoder of the hub; what then asks the hub fails at once, by HF_HUB_OFFLINE.
    """
    for name in (
        "utils",
        "benchmarker",
        "safetensors_utils",
        "benchmark_modules.hf",
        "benchmark_modules.vllm",
    ):
        module = import_module(f"euroeval.{name}")
        assert hasattr(module, "internet_connection_available"), f"euroeval.{name} has changed"
        setattr(module, "internet_connection_available", lambda: True)  # noqa: B010, mypy does not know them


def say(out, **message) -> None:
    out.write(json.dumps(message) + "\n")
    out.flush()


if __name__ == "__main__":
    main()
