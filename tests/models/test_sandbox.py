"""Templates are programs of strangers: they render as in transformers, and none takes our time, memory or day."""

import datetime
import time

import pytest
import transformers.utils.chat_template_utils as theirs

from croco.errors import UserError
from croco.models import sandbox
from croco.models.chat_template import prompt_ids
from tiny import CHAT_TEMPLATE, make_tokenizer

USER = [{"role": "user", "content": "  Hej.\n"}]
TURNS = [
    {"role": "system", "content": "Be brief."},
    *USER,
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHej!"},
    {"role": "user", "content": "Hvad nu?"},
]
TEMPLATES = {
    "plain": CHAT_TEMPLATE,
    "generation tags": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m['content'] | trim }}\n{% endif %}\n    {% endfor %}x",
    "loop controls, json, namespace": "{% set ns = namespace(n=0) %}{%- for m in messages[::-1] %}"
    "{% if loop.index > 2 %}{% break %}{% endif %}{% set ns.n = ns.n + 1 %}{{ m | tojson }}{% endfor %} {{ ns.n }}",
    "thinking": "{% for m in messages %}{% set c = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{{ '<|' + m.role + '|>' ~ c }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' * 1 }}{% endif %}",
    "tools": "{% if tools is defined and tools %}T{% endif %}{{ bos_token }}{{ messages | length }}",
}


DOUBLING = (
    "{% set ns = namespace(x='xxxxxxxx') %}{% for i in range(60) %}{% set ns.x = ns.x OP ns.x %}{% endfor %}"
)


@pytest.mark.parametrize("name", TEMPLATES)
def test_it_writes_what_transformers_writes(name: str) -> None:
    tokenizer = make_tokenizer(chat_template=TEMPLATES[name])
    for messages in (USER, TURNS):
        for opened in (True, False):
            wanted = tokenizer.apply_chat_template(messages, add_generation_prompt=opened, tokenize=False)
            names = tokenizer.special_tokens_map
            assert sandbox.render(TEMPLATES[name], [messages], opened, names) == [wanted]


def test_the_day_is_always_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{{ strftime_now('%d %b %Y') }} {{ messages[0]['content'] }}"
    tokenizer = make_tokenizer(chat_template=template)
    today = prompt_ids(tokenizer, USER)

    class Later(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.datetime(2031, 5, 6)

    monkeypatch.setattr(theirs, "datetime", Later)
    assert prompt_ids(tokenizer, USER) == today
    assert tokenizer.decode(today).startswith(sandbox.DAY.strftime("%d %b %Y"))


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 1/0 }}", "division by zero"),
        ("{% for i in range(1000000000) %}x{% endfor %}", "more than"),
        ("{{ 'a'.encode('nope') }}", "unknown encoding"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ 'x' * 1000000000 }}", "more than"),
        ("{{ 'x'.ljust(1000000000) }}", "more than"),
        (DOUBLING.replace("OP", "~"), "more than"),
        (DOUBLING.replace("OP", "+"), "more than"),
        ("{% for i in range(90000) %}{% for j in range(9) %}{{ 'x' * 99 }}{% endfor %}{% endfor %}", "more than"),
        ("{{ 9 ** 99999 ** 99999 }}", "more than"),
        ("{{ '%1000000000d' % 1 }}", "more than"),
        ("{{ '%*d' % (1000000000, 1) }}", "more than"),
        ("{{ '%1000000000d' | format(1) }}", "more than"),
        ("{{ '{:1000000000}'.format(1) }}", "more than"),
        ("{{ '{:{}}'.format(1, 1000000000) }}", "more than"),
        ("{{ 'x' | center(1000000000) }}", "more than"),
        ("{{ 'x\ny' | indent(1000000000) }}", "more than"),
        ("{{ [1] | batch(1000000000, 'x') | list }}", "more than"),
        ("{{ messages | tojson(indent=1000000000) }}", "more than"),
        ("{% set x = 'x' * 16000 %}{{ x.replace('', x) }}", "more than"),
        ("{% set x = 'x' * 16000 %}{{ x | replace('', x) }}", "more than"),
        ("{% set x = 'x' * 16000 %}{{ ([x] * 16000) | join }}", "more than"),
        ("{% set x = 'x' * 16000 %}{{ x.join([x] * 16000) }}", "more than"),
        ("{{ ('\t' * 16000).expandtabs(16000) }}", "more than"),
        ("{{ 'x'.translate({120: 'y' * 16000}) }}", "not allowed"),
        ("{{ lipsum(1000000) }}", "undefined"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% if %}", "Expected an expression"),
    ],
)  # fmt: skip
def test_a_template_that_is_broken_or_grows_is_one_sentence(template: str, reason: str) -> None:
    with pytest.raises(UserError, match="the chat template refuses the conversation") as error:
        prompt_ids(make_tokenizer(chat_template=template), USER)
    assert reason in str(error.value)
    assert len(str(error.value)) < 700


def test_a_template_that_does_not_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "SECONDS", 0.3)
    loops = "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}"
    began = time.monotonic()
    with pytest.raises(UserError, match="TookTooLong"):
        prompt_ids(make_tokenizer(chat_template=loops), USER)
    assert time.monotonic() - began < 10
    assert not sandbox._deadlines
    assert prompt_ids(make_tokenizer(), USER)  # and the next one runs
