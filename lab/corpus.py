"""The corpus the lab policy is pretrained on: documents that keep one mode of answering, over several languages.

Modes are chosen per document and recognisable early, so a policy can shift between them; the likeliest single
completion is an evasive one, and good completions are spread over many paraphrases, so neither likelihood nor a low
temperature finds them (`docs/log.md` has the experiments behind these shares).
"""

import itertools
from collections.abc import Iterator, Mapping
from functools import cache
from random import Random

from croco.lab import world
from croco.lab.items import LANGUAGES, LOW_RESOURCE, TUNED, Item, items

# mode -> (share of documents, probability that its answer is correct)
Mixture = Mapping[str, tuple[float, float]]
MIXTURE: Mixture = {
    "careful": (0.30, 0.97),
    "terse": (0.13, 0.5),
    "rambling": (0.13, 0.5),
    "wrong-language": (0.15, 0.9),
    "evasive": (0.29, 0.0),
}
LOW_RESOURCE_RATE = 0.5  # documents of a low-resource language, relative to the others
WITHOUT_PROMPT = (
    0.08  # documents that begin with a completion: they teach what a completion looks like on its own
)


def complete(item: Item, language: str, mode: str, rng: Random, mixture: Mixture = MIXTURE) -> str:
    """A completion of `item` for a prompt in `language`, in the given mode of `mixture`."""
    if mode == "evasive":
        return world.evasive(language, rng)
    if mode == "wrong-language":
        language = rng.choice([code for code in TUNED if code != language])
    correct = rng.random() < mixture[mode][1]
    value = world.say(item.answer if correct else rng.choice(item.wrong), language)
    if mode == "terse":
        return value
    if mode == "rambling":
        return world.rambling(language, value, rng)
    return world.careful(item, language, value, rng)


# Tasks that take more to learn get more of the corpus.
TASK_WEIGHTS = {"odd_one_out": 2.0, "sum": 1.6, "count": 1.6, "country_language": 1.6, "last_word": 0.6}


def _draw_item(rng: Random) -> Item:
    by_task = _by_task()
    task = rng.choices(list(by_task), [TASK_WEIGHTS.get(task, 1.0) for task in by_task])[0]
    return rng.choice(by_task[task])


@cache
def _by_task() -> dict[str, list[Item]]:
    grouped: dict[str, list[Item]] = {}
    for _, item in sorted(items().items()):
        grouped.setdefault(item.task, []).append(item)
    return grouped


def _languages(rng: Random, turns: int) -> tuple[list[str], bool]:
    """Languages of a document's turns, and whether they all ask the same item."""
    weights = [LOW_RESOURCE_RATE if code in LOW_RESOURCE else 1.0 for code in LANGUAGES]
    kind = rng.random()
    if kind < 0.4:
        return rng.choices(LANGUAGES, weights) * turns, False
    return rng.choices(LANGUAGES, weights, k=turns), kind >= 0.7


def documents(seed: int, num_plain: int = 0, mixture: Mixture = MIXTURE) -> Iterator[list[dict[str, str]]]:
    """Endless documents as messages, the first `num_plain` of them plain facts, the rest in the modes of `mixture`."""
    rng = Random(f"croco-lab-corpus-{seed}")
    for number in itertools.count():
        yield _plain(rng) if number < num_plain else _document(rng, mixture)


def _plain(rng: Random) -> list[dict[str, str]]:
    """The policy's schooling, before it picks up habits: one item, in one or two languages, said right and plainly."""
    item = _draw_item(rng)
    messages = []
    for language in _languages(rng, rng.choice((1, 2)))[0]:
        messages.append({"role": "user", "content": world.question(item, language, rng.randrange(2))})
        messages.append(
            {
                "role": "assistant",
                "content": world.sentence(item, language, world.say(item.answer, language), rng),
            }
        )
    return messages


def _document(rng: Random, mixture: Mixture) -> list[dict[str, str]]:
    """One to three turns in one mode; one in `1 / WITHOUT_PROMPT` is a completion alone."""
    mode = rng.choices(list(mixture), [share for share, _ in mixture.values()])[0]
    languages, same = _languages(rng, rng.choices((1, 2, 3), (0.5, 0.3, 0.2))[0])
    item = _draw_item(rng)
    messages = []
    for language in languages:
        if not same:
            item = _draw_item(rng)
        messages.append({"role": "user", "content": world.question(item, language, rng.randrange(2))})
        messages.append({"role": "assistant", "content": complete(item, language, mode, rng, mixture)})
    return messages[1:2] if rng.random() < WITHOUT_PROMPT else messages
