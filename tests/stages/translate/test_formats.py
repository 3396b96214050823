"""The messages of each format, written out as the models' cards have them."""

from __future__ import annotations

from typing import get_args

from croco.config.models import TranslationFormat
from croco.stages.translate.translate import FORMATS


def test_every_format_of_the_recipe_is_there() -> None:
    assert set(FORMATS) == set(get_args(TranslationFormat))


def test_translategemma_takes_a_list_with_one_entry() -> None:
    assert FORMATS["translategemma"]("Hello", "en", "pt-BR") == [
        {
            "role": "user",
            "content": [
                {"type": "text", "source_lang_code": "en", "target_lang_code": "pt-BR", "text": "Hello"}
            ],
        }
    ]


def test_tower_names_the_languages_around_the_text() -> None:
    (message,) = FORMATS["tower"]("Hello world!", "en", "pt-PT")
    assert message["content"] == (
        "Translate the following English source text to Portuguese (Portugal):\n"
        "English: Hello world!\nPortuguese (Portugal): "
    )
    (message,) = FORMATS["tower-instruct"]("Um grupo.", "pt", "en")
    assert message["content"] == (
        "Translate the following text from Portuguese into English.\nPortuguese: Um grupo.\nEnglish:"
    )


def test_an_instruct_model_is_asked_for_the_translation_only() -> None:
    (message,) = FORMATS["instruct"]("Hvad er {name}?", "da", "ga")
    instruction, _, text = message["content"].partition("\n\n")
    assert text == "Hvad er {name}?"
    assert instruction.startswith("Translate the text below from Danish into Irish.")
    assert "{name}, <tag> or %s" in instruction
