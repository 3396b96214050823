"""Each check on real sentences: what a good translation passes and what each kind of bad one is called."""

from __future__ import annotations

from typing import get_args

import pytest

from croco.config.models import TranslationCheck
from croco.stages.translate.checks import fault

CHECKS = get_args(TranslationCheck)
AMONG = ("en", "da", "nl", "de", "fr", "it", "es", "gl", "cy", "mt", "ga", "nb", "sv", "pt")
SOURCE = "Explain in two sentences why the days are longer in summer than in winter."
GOOD = {
    "da": "Forklar i to sætninger, hvorfor dagene er længere om sommeren end om vinteren.",
    "nl": "Leg in twee zinnen uit waarom de dagen in de zomer langer zijn dan in de winter.",
    "de": "Erkläre in zwei Sätzen, warum die Tage im Sommer länger sind als im Winter.",
    "fr": "Explique en deux phrases pourquoi les jours sont plus longs en été qu'en hiver.",
    "it": "Spiega in due frasi perché le giornate sono più lunghe d'estate che d'inverno.",
    "es": "Explica en dos frases por qué los días son más largos en verano que en invierno.",
    "gl": "Explica en dúas frases por que os días son máis longos no verán ca no inverno.",
    "cy": "Eglurwch mewn dwy frawddeg pam mae'r dyddiau'n hirach yn yr haf nag yn y gaeaf.",
    "mt": "Spjega f'żewġ sentenzi għaliex il-jiem huma itwal fis-sajf milli fix-xitwa.",
    "ga": "Mínigh in dhá abairt cén fáth a bhfuil na laethanta níos faide sa samhradh ná sa gheimhreadh.",
    "nb": "Forklar i to setninger hvorfor dagene er lengre om sommeren enn om vinteren.",
    "sv": "Förklara i två meningar varför dagarna är längre på sommaren än på vintern.",
    "pt": "Explique em duas frases por que razão os dias são mais longos no verão do que no inverno.",
}


def reason(
    source: str, translation: str, language: str = "da", checks: tuple[str, ...] = CHECKS
) -> str | None:
    return fault(source, translation, language, AMONG, checks, (0.5, 2.5))


@pytest.mark.parametrize("language", GOOD)
def test_a_good_translation_passes_and_one_into_another_language_does_not(language: str) -> None:
    assert reason(SOURCE, GOOD[language], language) is None
    other = "sv" if language == "fr" else "fr"
    assert reason(SOURCE, GOOD[other], language) == f"wrong language: found {other}, expected {language}"


@pytest.mark.parametrize(
    ("source", "translation", "found"),
    [
        (SOURCE, " \n", "empty translation"),
        (SOURCE, SOURCE.lower() + "!", "untranslated copy: the translation is the source"),
        (SOURCE, "Forklar.", "length: 8 characters for 74, expected 0.5 to 2.5 times as many"),
        ("Hi!", "Hej! " * 35, "length: 175 characters for 3, expected 0.5 to 2.5 times as many"),
        (
            "See https://x.org/en now",
            "Se https://x.org/da nu",
            "URL changed: https://x.org/en occurs 1,",
        ),
        ("Dear {name},", "Kære {navn},", "placeholder changed: {name} occurs 1, then 0 times"),
        ("Dear {name},", "Kære {name} {name},", "placeholder changed: {name} occurs 1, then 2 times"),
        ("What is `list`?", "Hvad er `liste`?", "inline code changed: `list` occurs 1, then 0 times"),
        ("Write a loop.", "Skriv:\n```\nfor\n```", "code fence changed: ``` occurs 0, then 2 times"),
        ("Simplify \\frac{a}{b}.", "Forenkl a/b.", "LaTeX command changed: \\frac occurs 1, then 0"),
        ("Mail me@x.org", "Skriv til mig@x.org", "e-mail address changed: me@x.org occurs 1,"),
        ("In 1914 and 1914", "I 1914", "number lost: 1914 occurs 2, then 1 times"),
    ],
)
def test_what_is_wrong_has_a_name(source: str, translation: str, found: str) -> None:
    assert (reason(source, translation) or "passed").startswith(found)


def test_a_loop_is_not_a_translation_but_a_source_that_repeats_itself_may_be_repeated() -> None:
    looping = GOOD["da"] + " og om vinteren" * 40
    assert (reason(SOURCE, looping, checks=("repetition",)) or "").startswith("repetition: it compresses")
    assert reason("and so on " * 60, "og så videre " * 60, checks=("repetition",)) is None


@pytest.mark.parametrize(
    ("source", "translation"),
    [
        ("Taylor Swift", "Taylor Swift"),  # too short to be a copy
        ("OK", "Einverstanden"),
        ("I have 2 cats and 12 dogs.", "Jeg har to katte og tolv hunde."),  # small numbers may become words
        ("In the twenties", "I 1920'erne"),  # and words numbers
        ("It costs $1,234.50.", "Det koster 1.234,50 dollar."),
        ("", ""),
    ],
)
def test_what_a_translator_may_do(source: str, translation: str) -> None:
    assert reason(source, translation) is None


def test_a_check_that_is_not_asked_for_is_not_made() -> None:
    faults = {"items": "{x}", "numbers": "1914", "copy": SOURCE, "language": SOURCE}
    for name, text in faults.items():
        broken = {"items": "y", "numbers": "", "copy": SOURCE, "language": GOOD["fr"]}[name]
        assert reason(f"Kære {text}", f"Kære {broken}", checks=(name,)) is not None, name
        others = tuple(check for check in CHECKS if check not in (name, "length", "language"))
        assert reason(f"Kære {text}", f"Kære {broken}", checks=others) is None, name
