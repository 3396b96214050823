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
