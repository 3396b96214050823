"""What a translation must not touch: whole stretches that are never sent, and items in prose that are checked after.

Code blocks, display maths, JSON and tool calls are cut out and put back. Inline code, URLs, e-mail addresses,
placeholders, LaTeX commands and numbers stay, because a sentence with holes is translated badly; `items` counts them in
both texts (docs/decisions/012). Leaves out names, units and quotations."""

import json
import re
from collections import Counter
from unicodedata import decimal

Piece = tuple[str, bool]  # a stretch of text, and whether it is sent to be translated

_OPENING = re.compile(
    r"""`{3,}|^~{3,}|\$\$|\\\[|\\begin\{[A-Za-z]+\*?\}|<tool_call>|\{(?=\s*")|\[(?=\s*\{)""", re.MULTILINE
)
_JSON = json.JSONDecoder()

_ITEM = re.compile(
    r"""
    (?P<fence>`{3,}|~{3,})
  | (?P<code>(?P<ticks>`{1,2})(?:(?!'')[^`\n])+(?P=ticks))
  | (?P<url>(?:https?://|www\.)[^\s<>"`]+)
  | (?P<email>(?<![\w.+-])[\w.+-]{1,64}@[\w-]+(?:\.[\w-]+)+)
  | (?P<placeholder>
        (?<![\w}\]])(?:\{\{[^{}\n]*\}\} | \$?\{\w[\w.:-]*\}) | %\(\w+\)[a-z] | %(?:\d+\$)?[sd](?!\w) | \$[A-Za-z_]\w*
      | </?[A-Za-z][\w:-]*(?:\s[^<>=]*=[^<>]*|\s*/?)>
    )
  | (?P<latex>\\(?![ntr](?:[A-Z]|\b))[A-Za-z]{2,}(?=[{_^\\$)\]\s]|$))
  | (?P<entity>&\#?\w+;)
  | (?P<number>(?<!\d)\d{1,3}(?P<separator>[.,'’\u00a0\u202f\ ])\d{3}(?:(?P=separator)\d{3})*(?!\d) | \d+)
    """,
    re.VERBOSE,
)
KINDS = {
    "fence": "code fence",
    "code": "inline code",
    "url": "URL",
    "email": "e-mail address",
    "placeholder": "placeholder",
    "latex": "LaTeX command",
    "number": "number",
}


def pieces(text: str) -> list[Piece]:
    """The text in stretches to translate and stretches to leave, which joined are the text again. Whitespace around a
    stretch to translate is left out of it; one without words outside its items is not sent."""
    stretches: list[Piece] = []
    start = at = 0
    while opening := _OPENING.search(text, at):
        end = _end(text, opening)
        if end is None:
            at = opening.end()
            continue
        stretches += _prose(text[start : opening.start()])
        stretches.append((text[opening.start() : end], False))
        start = at = end
    return [piece for piece in (*stretches, *_prose(text[start:])) if piece[0]]


def _end(text: str, opening: re.Match[str]) -> int | None:
    """Where the stretch ends that begins here; None when none does."""
    mark = opening[0]
    if mark in ("{", "["):
        try:
            value, end = _JSON.raw_decode(text, opening.start())
        except (ValueError, RecursionError):
            return None
        # [1] is a citation and {} nothing: a stretch of JSON has keys
        return end if value and (isinstance(value, dict) or isinstance(value[0], dict)) else None
    end_mark = re.compile(_closing(mark)).search(text, opening.end())
    return None if end_mark is None else end_mark.end()


def _closing(mark: str) -> str:
    """The pattern that ends a stretch; a fence or a tool call that is not closed goes to the end of the text."""
    match mark[0]:
        case "`" | "~":
            return mark[0] + r"{3,}|\Z"
        case "<":
            return r"</tool_call>|\Z"
        case "$":
            return r"\$\$"
    return r"\\\]" if mark == "\\[" else re.escape(mark.replace("begin", "end", 1))


def _prose(text: str) -> list[Piece]:
    if not any(map(str.isalpha, _ITEM.sub("", text))):  # no words outside the items
        return [(text, False)]
    body = text.strip()
    before, after = text[: text.index(body)], text[text.index(body) + len(body) :]
    return [(before, False), (body, True), (after, False)]


def prose(text: str) -> str:
    """What of a text is in a language: the stretches to translate without their items."""
    return " ".join(_ITEM.sub(" ", body) for body, sent in pieces(text) if sent)


def items(text: str) -> Counter[tuple[str, str]]:
    """How often each (kind, item) occurs in a text; kinds are the keys of `KINDS`. Numbers are compared without
    separators, so 1,234.5 is 1.234,5 and 31.12.2024 is 12/31/2024."""
    counts: Counter[tuple[str, str]] = Counter()
    for match in _ITEM.finditer(text):
        kind, item = str(match.lastgroup), match[0]
        if kind == "entity":
            continue  # &#8220; is a quotation mark, which every language has its own
        if kind == "url":
            item = item.rstrip(".,;:!?)]}*_'’”»")
        elif kind == "number":
            item = "".join(str(decimal(digit)) for digit in item if digit.isdecimal()).lstrip("0") or "0"
        counts[kind, item] += 1
    return counts
