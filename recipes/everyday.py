"""Short everyday instructions in eight languages, each with a constraint that a program checks.

The same instruction exists in every language: five kinds of task about a month, a weekday or a country, whose words
come from CLDR through Babel. Splits have no topic in common. `python everyday.py` writes everyday-SPLIT.jsonl.gz beside
this file. As a reward, `function = "everyday.py:usable"` says whether a completion is of use, and
`everyday.py:constraint` whether it does what was asked; neither can see whether a completion was cut.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

from babel import Locale

from croco.languages import identify

TUNED, HELD_OUT = ("en", "fr", "es", "de", "it"), ("pt", "nl", "da")
LANGUAGES = TUNED + HELD_OUT
SPLITS = {"train": (300, 45), "dev": (100, 15), "test": (300, 44)}  # prompts, topics
COUNTRIES = (  # noqa: SIM905
    "AR AT AU BE BG BO BR CA CH CL CN CO CU CZ DE DK EC EE EG ES ET FI FR GB GH GR GT HR HU ID IE IL IN IQ IR IS IT JM "
    "JP KE KR LB LT LU LV MA MD MG MN MT MX MY NG NI NO NP NZ PA PE PH PK PL PT PY RO RS RU RW SA SE SI SK SN SV TH TN "
    "TR TZ UA UG US UY VE VN ZA"
).split()
# kind -> the sentence in every language; {topic} stands behind a colon, so that no language has to inflect it
TEMPLATES: dict[str, dict[str, str]] = {
    "use": {
        "en": "Write one or two sentences on this topic: {topic}. Use the word “{word}”.",
        "fr": "Écris une ou deux phrases sur ce sujet : {topic}. Utilise le mot « {word} ».",
        "es": "Escribe una o dos frases sobre este tema: {topic}. Usa la palabra «{word}».",
        "de": "Schreibe ein oder zwei Sätze zu diesem Thema: {topic}. Verwende das Wort „{word}“.",
        "it": "Scrivi una o due frasi su questo tema: {topic}. Usa la parola «{word}».",
        "pt": "Escreva uma ou duas frases sobre este tema: {topic}. Use a palavra “{word}”.",
        "nl": "Schrijf een of twee zinnen over dit onderwerp: {topic}. Gebruik het woord ‘{word}’.",
        "da": "Skriv en eller to sætninger om dette emne: {topic}. Brug ordet »{word}«.",
    },
    "short": {
        "en": "Say something about this topic: {topic}. Use at most {n} words.",
        "fr": "Dis quelque chose sur ce sujet : {topic}. Utilise au plus {n} mots.",
        "es": "Di algo sobre este tema: {topic}. Usa como máximo {n} palabras.",
        "de": "Sag etwas zu diesem Thema: {topic}. Verwende höchstens {n} Wörter.",
        "it": "Di' qualcosa su questo tema: {topic}. Usa al massimo {n} parole.",
        "pt": "Diga alguma coisa sobre este tema: {topic}. Use no máximo {n} palavras.",
        "nl": "Zeg iets over dit onderwerp: {topic}. Gebruik hoogstens {n} woorden.",
        "da": "Sig noget om dette emne: {topic}. Brug højst {n} ord.",
    },
    "list": {
        "en": "Make a numbered list of {n} words that go with this topic: {topic}.",
        "fr": "Fais une liste numérotée de {n} mots qui vont avec ce sujet : {topic}.",
        "es": "Haz una lista numerada de {n} palabras relacionadas con este tema: {topic}.",
        "de": "Mach eine nummerierte Liste mit {n} Wörtern, die zu diesem Thema passen: {topic}.",
        "it": "Fai un elenco numerato di {n} parole legate a questo tema: {topic}.",
        "pt": "Faça uma lista numerada de {n} palavras relacionadas a este tema: {topic}.",
        "nl": "Maak een genummerde lijst van {n} woorden die bij dit onderwerp horen: {topic}.",
        "da": "Lav en nummereret liste med {n} ord, der passer til dette emne: {topic}.",
    },
    "begin": {
        "en": "Write a short message to a friend on this topic: {topic}. Begin with the word “{word}”.",
        "fr": "Écris un court message à un ami sur ce sujet : {topic}. Commence par le mot « {word} ».",
        "es": "Escribe un mensaje corto a un amigo sobre este tema: {topic}. Empieza con la palabra «{word}».",
        "de": "Schreibe eine kurze Nachricht an einen Freund zu diesem Thema: {topic}. Beginne mit dem Wort „{word}“.",
        "it": "Scrivi un breve messaggio a un amico su questo tema: {topic}. Comincia con la parola «{word}».",
        "pt": "Escreva uma mensagem curta para um amigo sobre este tema: {topic}. Comece com a palavra “{word}”.",
        "nl": "Schrijf een kort bericht aan een vriend over dit onderwerp: {topic}. Begin met het woord ‘{word}’.",
        "da": "Skriv en kort besked til en ven om dette emne: {topic}. Begynd med ordet »{word}«.",
    },
    "question": {
        "en": "Ask one question on this topic: {topic}. Write only the question.",
        "fr": "Pose une question sur ce sujet : {topic}. Écris seulement la question.",
        "es": "Haz una pregunta sobre este tema: {topic}. Escribe solo la pregunta.",
        "de": "Stelle eine Frage zu diesem Thema: {topic}. Schreibe nur die Frage.",
        "it": "Fai una domanda su questo tema: {topic}. Scrivi solo la domanda.",
        "pt": "Faça uma pergunta sobre este tema: {topic}. Escreva só a pergunta.",
        "nl": "Stel één vraag over dit onderwerp: {topic}. Schrijf alleen de vraag.",
        "da": "Stil ét spørgsmål om dette emne: {topic}. Skriv kun spørgsmålet.",
    },
}
NUMBERS = {"short": (10, 15), "list": (3, 5)}
WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")


@dataclass(frozen=True)
class Item:
    """One instruction without its language: concepts are ("month", "5"), ("weekday", "0") or ("country", "FR")."""

    kind: str
    topic: tuple[str, str]
    word: tuple[str, str] | None = None
    n: int | None = None

    @property
    def prompt_id(self) -> str:
        return ".".join([self.kind, *self.topic, *(self.word or ()), *([str(self.n)] if self.n else [])])


@cache
def say(concept: tuple[str, str], language: str) -> str:
    """CLDR's word for a concept."""
    locale, (category, code) = Locale(language), concept
    if category == "country":
        return str(locale.territories[code])
    names = locale.months if category == "month" else locale.days
    return str(names["stand-alone"]["wide"][int(code)])


def instruction(item: Item, language: str) -> str:
    word = say(item.word, language) if item.word else ""
    return TEMPLATES[item.kind][language].format(topic=say(item.topic, language), word=word, n=item.n)


@cache
def splits() -> dict[str, list[Item]]:
    """The items of every split; the same in every process."""
    rng = Random("croco everyday")
    times = [("month", str(i)) for i in range(1, 13)] + [("weekday", str(i)) for i in range(7)]
    topics = times + [("country", code) for code in COUNTRIES]
    rng.shuffle(topics)
    made: dict[str, list[Item]] = {}
    for split, (num_prompts, num_topics) in SPLITS.items():
        here, topics = topics[:num_topics], topics[num_topics:]
        items = []
        for topic in here:
            words = rng.sample([concept for concept in times if concept[0] != topic[0]], 4)
            for place in range(2):
                items += [Item("use", topic, words[place]), Item("begin", topic, words[place + 2])]
                items += [Item(kind, topic, n=numbers[place]) for kind, numbers in NUMBERS.items()]
            items.append(Item("question", topic))
        made[split] = rng.sample(items, num_prompts)
    return made


@cache
def _items() -> dict[tuple[str, str], Item]:
    """Every item by its language and text."""
    every = [item for items in splits().values() for item in items]
    return {(language, instruction(item, language)): item for language in LANGUAGES for item in every}


# human text that no prompt asks for: on it a model that was tuned should not have become worse
TEXT = {
    "en": "In winter the little shop at the corner opens at seven. The owner sweeps the snow from the steps, "
    "puts the bread on the shelf and makes coffee for everyone who comes in. Most people stay for a few "
    "minutes and talk about the weather or about their children. On Sundays the shop is closed, and the "
    "street is very quiet.",
    "fr": "En hiver, la petite boutique du coin ouvre à sept heures. La patronne balaie la neige des marches, "
    "met le pain sur l'étagère et prépare du café pour tous ceux qui entrent. La plupart des gens restent "
    "quelques minutes et parlent du temps ou de leurs enfants. Le dimanche, la boutique est fermée et la "
    "rue est très calme.",
    "es": "En invierno, la pequeña tienda de la esquina abre a las siete. La dueña barre la nieve de los "
    "escalones, pone el pan en el estante y prepara café para todos los que entran. La mayoría de la "
    "gente se queda unos minutos y habla del tiempo o de sus hijos. Los domingos la tienda está cerrada y "
    "la calle está muy tranquila.",
    "de": "Im Winter öffnet der kleine Laden an der Ecke um sieben. Die Besitzerin fegt den Schnee von den "
    "Stufen, legt das Brot ins Regal und kocht Kaffee für alle, die hereinkommen. Die meisten Leute "
    "bleiben ein paar Minuten und reden über das Wetter oder über ihre Kinder. Am Sonntag ist der Laden "
    "geschlossen, und die Straße ist sehr still.",
    "it": "D'inverno il piccolo negozio all'angolo apre alle sette. La proprietaria spazza la neve dai gradini, "
    "mette il pane sullo scaffale e prepara il caffè per tutti quelli che entrano. La maggior parte della "
    "gente resta qualche minuto e parla del tempo o dei propri figli. La domenica il negozio è chiuso e "
    "la strada è molto tranquilla.",
    "pt": "No inverno, a pequena loja da esquina abre às sete. A dona varre a neve dos degraus, põe o pão na "
    "prateleira e faz café para todos os que entram. A maioria das pessoas fica alguns minutos e fala do "
    "tempo ou dos filhos. Aos domingos a loja está fechada e a rua fica muito calma.",
    "nl": "In de winter gaat de kleine winkel op de hoek om zeven uur open. De eigenares veegt de sneeuw van de "
    "treden, legt het brood op de plank en zet koffie voor iedereen die binnenkomt. De meeste mensen "
    "blijven een paar minuten en praten over het weer of over hun kinderen. Op zondag is de winkel dicht "
    "en is het heel stil op straat.",
    "da": "Om vinteren åbner den lille butik på hjørnet klokken syv. Ejeren fejer sneen væk fra trinene, lægger "
    "brødet på hylden og laver kaffe til alle, der kommer ind. De fleste bliver et par minutter og taler "
    "om vejret eller om deres børn. Om søndagen er butikken lukket, og der er meget stille på gaden.",
}


def rows(split: str) -> Iterator[dict[str, object]]:
    """Rows of a prompts file: every item in every language."""
    for item in splits()[split]:
        for language in LANGUAGES:
            messages = [{"role": "user", "content": instruction(item, language)}]
            yield {
                "prompt_id": item.prompt_id,
                "language": language,
                "messages": messages,
                "domain": item.kind,
            }


def is_met(item: Item, language: str, completion: str) -> bool:
    """Whether a completion does what the item asks."""
    text = completion.strip()
    words = [word.casefold() for word in WORD.findall(text)]
    if item.kind == "short":
        return 3 <= len(words) <= (item.n or 0)
    if item.kind == "list":
        numbers = re.findall(r"^\s*(\d+)[.)]\s*\S", text, flags=re.MULTILINE)
        return numbers == [str(i + 1) for i in range(item.n or 0)]
    if item.kind == "question":
        return text.endswith("?") and text.count("?") == 1
    assert item.word is not None
    wanted = [word.casefold() for word in WORD.findall(say(item.word, language))]
    places = range(len(words)) if item.kind == "use" else range(1)
    return any(words[place : place + len(wanted)] == wanted for place in places)


def checks(item: Item, language: str, completion: str) -> dict[str, bool]:
    """Each part of being of use, by itself."""
    from wordfreq import word_frequency

    words = [word.casefold() for word in WORD.findall(completion)]
    asked = instruction(item, language)
    given = {word.casefold() for word in WORD.findall(asked)}
    letters = [word for word in words if not word.isdecimal()]
    known = [word in given or word_frequency(word, language) > 0 for word in letters]
    triples, asked_triples = _triples(words), set(_triples([word.casefold() for word in WORD.findall(asked)]))
    return {
        "constraint": is_met(item, language, completion),
        "in the language": identify(completion, LANGUAGES, 0.9) == language,
        "known words": bool(known) and sum(known) >= 0.85 * len(known),
        "no loop": len(set(triples)) >= 0.8 * len(triples),
        "no echo": 2 * sum(triple in asked_triples for triple in triples) < max(1, len(triples)),
    }


def _triples(words: Sequence[str]) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + 3]) for i in range(len(words) - 2)]


def parts(prompt_id: str, language: str, completion: str, finish_reason: str) -> dict[str, bool]:
    """Each part of being of use, by itself, of a row of a run's tables: `checks`, and that it ended by itself."""
    return checks(_by_id()[prompt_id], language, completion) | {"ended": finish_reason == "stop"}


@cache
def _by_id() -> dict[str, Item]:
    return {item.prompt_id: item for items in splits().values() for item in items}


Messages = Sequence[Mapping[str, str]]


def usable(messages: Sequence[Messages], completions: Sequence[str], languages: Sequence[str]) -> list[float]:
    """1 for a completion that passes every check, else 0."""
    return [float(all(checks(*row).values())) for row in _asked(messages, completions, languages)]


def constraint(
    messages: Sequence[Messages], completions: Sequence[str], languages: Sequence[str]
) -> list[float]:
    """1 for a completion that does what was asked, in whatever language, else 0."""
    return [float(is_met(*row)) for row in _asked(messages, completions, languages)]


def _asked(
    messages: Sequence[Messages], completions: Sequence[str], languages: Sequence[str]
) -> Iterator[tuple[Item, str, str]]:
    for turns, completion, language in zip(messages, completions, languages, strict=True):
        yield _items()[language, turns[-1]["content"]], language, completion


def write(folder: Path) -> None:
    """Write the three files, byte for byte the same every time."""
    for split in SPLITS:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows(split))
        (folder / f"everyday-{split}.jsonl.gz").write_bytes(gzip.compress(text.encode(), mtime=0))


if __name__ == "__main__":
    write(Path(__file__).parent)
