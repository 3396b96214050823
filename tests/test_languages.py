"""Codes, names and recognition of the fourteen languages."""

from __future__ import annotations

import pytest

from croco import languages
from croco.errors import UserError

SENTENCES = {
    "en": "The weather is fine today and we are going to the beach with the children.",
    "da": "Vejret er godt i dag, og vi tager på stranden med børnene.",
    "nl": "Het weer is vandaag goed en we gaan met de kinderen naar het strand.",
    "de": "Das Wetter ist heute schön und wir gehen mit den Kindern an den Strand.",
    "fr": "Il fait beau aujourd'hui et nous allons à la plage avec les enfants.",
    "it": "Oggi il tempo è bello e andiamo in spiaggia con i bambini.",
    "es": "Hoy hace buen tiempo y vamos a la playa con los niños.",
    "gl": "Hoxe fai bo tempo e imos á praia cos nenos.",
    "cy": "Mae'r tywydd yn braf heddiw ac rydym yn mynd i'r traeth gyda'r plant.",
    "mt": "It-temp illum huwa sabiħ u aħna sejrin il-baħar mat-tfal.",
    "ga": "Tá an aimsir go breá inniu agus táimid ag dul go dtí an trá leis na páistí.",
    "nb": "Jeg vet ikke hva som skjedde på hytta, men nå må vi dra hjem før det blir mørkt.",
    "sv": "Vädret är fint idag och vi ska åka till stranden med barnen.",
    "pt": "O tempo está bom hoje e vamos à praia com as crianças.",
}


@pytest.mark.parametrize("code", SENTENCES)
def test_a_sentence_is_recognised_among_all(code: str) -> None:
    assert languages.identify(SENTENCES[code], list(SENTENCES)) == code


def test_no_letters_no_language() -> None:
    assert languages.identify("12 + 3 = 15", list(SENTENCES)) is None


def test_codes_and_names() -> None:
    assert [languages.name(code) for code in ("da", "nb", "pt-BR")] == [
        "Danish",
        "Norwegian Bokmål",
        "Portuguese (Brazil)",
    ]
    for code in (*SENTENCES, "pt-BR", "zh-Hant-TW", "es-419"):
        assert languages.check(code) == code
    for code in ("english", "DA", "da_DK", "xx", "", "../da"):
        with pytest.raises(UserError):
            languages.check(code)


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ("da", "da"),
        ("deu", "de"),
        ("deu_Latn", "de"),
        ("arb_Arab", "ar"),
        ("nob_Latn", "nb"),
        ("pt-BR", "pt-BR"),
    ],
)
def test_codes_of_other_data_sets(given: str, code: str) -> None:
    assert languages.normal(given) == code


def test_a_name_is_no_code() -> None:
    with pytest.raises(UserError, match="'German' is no BCP-47 language code"):
        languages.normal("German")


AMONG = ["da", "nl", "en", "fr", "nb"]
DANISH = "Hovedstaden i Danmark hedder København, og den ligger på Sjælland."
DUTCH = "De hoofdstad van Nederland is Amsterdam, een stad met veel grachten."
ENGLISH = "The capital of Denmark is Copenhagen, which lies on an island."


@pytest.mark.parametrize(
    ("completion", "language", "mode"),
    [
        (DANISH, "da", languages.RIGHT),
        (DUTCH, "nl", languages.RIGHT),
        (ENGLISH, "da", languages.WRONG),
        ("Amsterdam.", "nl", languages.UNKNOWN),
        ("1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14", "en", languages.UNKNOWN),
    ],
)
def test_languages_are_told_apart_and_short_texts_are_not_judged(completion, language, mode):
    (identified,) = languages.identify_completions([completion], AMONG, [language])
    assert languages.language_mode(identified, language) == mode


def test_many_at_once_are_what_they_are_alone():
    texts = ["Amsterdam.", ENGLISH, "Amsterdam.", "La capitale du Danemark est Copenhague."]
    alone = [languages.identify_completions([text], AMONG, ["da"])[0] for text in texts]
    assert languages.identify_completions(texts, AMONG, ["da"] * 4) == alone == [None, "en", None, "fr"]


@pytest.mark.parametrize("codes", [("pt", "pt-BR"), ("pt-BR", "pt")])
def test_varieties_of_one_language_are_not_told_apart(codes):
    text = SENTENCES["pt"]
    among = [*codes, "en"]
    assert languages.identify_completions([text, text, SENTENCES["en"]], among, [*codes, codes[0]]) == [
        *codes,
        "en",
    ]
    for code in codes:
        assert languages.language_mode(codes[0], code) == languages.RIGHT
    assert languages.identify(text, codes) is None  # both are one language: there is nothing to choose from


def test_among_a_single_language_nothing_can_be_told():
    assert languages.identify_completions([SENTENCES["pt"]], ["en"], ["en"]) == [None]
    assert languages.language_mode(None, "en") == languages.UNKNOWN
