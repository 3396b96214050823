"""Languages by their BCP-47 code: well-formed, named, and recognised in text.

Names come from CLDR through Babel; recognition is py3langid, offline, restricted to the languages in question. What a
language is used for (tuned, held out, low-resource) is the recipe's business.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from copy import copy
from functools import cache, lru_cache
from typing import Any

from croco.errors import UserError

# language, optional script, optional region, optional variants: what BCP-47 calls a langtag, without extensions
CODE = re.compile(r"[a-z]{2,3}(-[A-Z][a-z]{3})?(-([A-Z]{2}|\d{3}))?(-[a-z0-9]{5,8})*")
# py3langid knows Bokmål under the macrolanguage's code
IDENTIFIER_CODES = {"nb": "no"}
RIGHT, WRONG, UNKNOWN = "right-language", "wrong-language", "unknown"
MIN_LETTERS = 20  # a name or a number says nothing about the language that it stands in


def check(code: str) -> str:
    """The code itself when it is a well-formed BCP-47 code of a language that CLDR names; else UserError."""
    if not CODE.fullmatch(code):
        raise UserError(f"'{code}' is no BCP-47 language code (expected such as 'da', 'nb', 'pt-BR')")
    from babel import Locale

    if code.split("-")[0] not in Locale("en").languages:
        raise UserError(f"'{code}' is no language that CLDR knows (expected such as 'da', 'nb', 'pt-BR')")
    return code


def normal(code: str) -> str:
    """The BCP-47 code that a code of ISO 639-3 stands for, alone or with a script as in FLORES: 'deu_Latn' →
    'de', 'arb' → 'ar', 'da' → 'da'. Raises UserError as `check` does.
    """
    from babel.core import get_global

    language = code.split("_")[0] if re.fullmatch(r"[a-z]{3}_[A-Z][a-z]{3}", code) else code
    return check(str(get_global("language_aliases").get(language, language)))


def name(code: str) -> str:
    """English name of a language: 'da' → 'Danish', 'pt-BR' → 'Portuguese (Brazil)'."""
    from babel import Locale

    parts = code.split("-")
    names = Locale("en").languages
    region = Locale("en").territories.get(parts[-1]) if len(parts) > 1 else None
    return str(names.get(parts[0], code)) + (f" ({region})" if region else "")


def _identifier_code(code: str) -> str:
    """The identifier's name for a language: it knows no scripts and regions."""
    language = code.split("-")[0]
    return IDENTIFIER_CODES.get(language, language)


@lru_cache(maxsize=8)
def _identifier(codes: tuple[str, ...] | None) -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    if codes is None:
        return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier = copy(_identifier(None))  # the same tables: they take 80 MB
    identifier.set_languages(list(codes))
    return identifier


@cache
def identifiable(code: str) -> bool:
    """Whether the identifier knows a language."""
    return _identifier_code(code) in _identifier(None).labels


def same_to_identifier(one: str, other: str) -> bool:
    """Whether the identifier cannot tell two codes apart: varieties of one language."""
    return _identifier_code(one) == _identifier_code(other)


def count_letters(text: str) -> int:
    return sum(map(str.isalpha, text))


def identify(text: str, among: Sequence[str], confidence: float = 0.5, min_letters: int = 1) -> str | None:
    """Which of the languages a text is in; None when it has too few letters or none reaches the confidence (0 to 1).

    A language that the identifier does not know (`identifiable`) is never the answer, and two varieties of one language
    count as the first of them. With a single language given the answer is None. A text in a language that is not given
    counts as the one that it resembles most.
    """
    by_code: dict[str, str] = {}
    for code in filter(identifiable, among):
        by_code.setdefault(_identifier_code(code), code)
    if len(by_code) < 2 or count_letters(text) < min_letters:
        return None
    label, probability = _identifier(tuple(sorted(by_code))).classify(text)
    return by_code[label] if probability >= confidence else None


def identify_completions(
    completions: Iterable[str], among: Sequence[str], expected: Iterable[str]
) -> list[str | None]:
    """The language of each completion, each text looked at once; None for one too short or too mixed to judge.

    A variety of the expected language counts as the expected one: they cannot be told apart.
    """
    known: dict[str, str | None] = {}
    identified = []
    for text, code in zip(completions, expected, strict=True):
        if text not in known:
            known[text] = identify(text, among, min_letters=MIN_LETTERS)
        language = known[text]
        identified.append(code if language is not None and same_to_identifier(language, code) else language)
    return identified


def language_mode(identified: str | None, language: str) -> str:
    """ "right-language", "wrong-language", or "unknown", of a completion identified as being in a language."""
    if identified is None:
        return UNKNOWN
    return RIGHT if same_to_identifier(identified, language) else WRONG
