"""Chat templates: what they may use, where they are found, and that a hostile one is stopped soon."""
import datetime
import json
import sys
import time

import pytest

from minilora.errors import ConfigError, FileError, FormatError
from minilora.models.text.chat import render, templates_in

MESSAGES = [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "<é> & 2"},
            {"role": "assistant", "content": "4"}]


@pytest.fixture(autouse=True)
def jinja2():
    return pytest.importorskip("jinja2")


def show(template, messages=MESSAGES, **variables):
    return render({"default": template}, None, {"messages": messages, "add_generation_prompt": False, **variables})


CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message.content | trim + '<|im_end|>' ~ '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def test_a_chat():
    text = ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<é> & 2<|im_end|>\n"
            "<|im_start|>assistant\n4<|im_end|>\n")
    assert show(CHATML) == text
    assert show(CHATML, add_generation_prompt=True) == text + "<|im_start|>assistant\n"
    assert show(CHATML, []) == ""


@pytest.mark.parametrize("template, text", [
    ("{{ messages | tojson }}", '[{"role": "user", "content": "<é> & 2"}]'),
    ("{{ messages[0] | tojson(indent=2) }}", '{\n  "role": "user",\n  "content": "<é> & 2"\n}'),
    ("{% for m in messages %}\n  {% if loop.first %}\nx\n  {% endif %}\n{% endfor %}\n", "x\n"),
    ("{% for i in range(5) %}{% if i == 1 %}{% continue %}{% endif %}{% if i > 2 %}{% break %}{% endif %}{{ i }}{% endfor %}",
     "02"),
    ("{% generation %}a{{ 1 }}{% endgeneration %}b", "a1b"),
    ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "1"),
    ("{% macro f(x, y=2) %}[{{ x }}{{ y }}]{% endmacro %}{{ f(1) ~ f(3, y=4) }}", "[12][34]"),
    ("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}", "1"),
    ("{{ messages | map(attribute='role') | join(', ') }}{{ messages | map(attribute='role') | map('upper') | first }}",
     "userUSER"),
    ("{{ 'a-b-c'.split('-')[-1] }}{{ ' x '.strip() }}{{ 'abc'[1:] }}{{ messages[1:] | length }}{{ 'b' in 'abc' }}",
     "cxbc0True"),
    ("{% if messages[0].name is defined %}1{% elif messages[0]['role'] is string %}2{% endif %}{{ none_such }}", "2"),
    ("{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}", "role=user;content=<é> & 2;"),
    ("{{ 'a\nb' | indent(2) }}{{ 'aXa' | replace('a', 'bb') }}{{ 'aa'.replace('a', '') }}{{ [1, [2, 3]] }}",
     "a\n  bbbXbb[1, [2, 3]]"),
    ("{{ 2 * 'ab' }}{{ 7 % 3 }}{{ '%s-%d' % ('a', 2) }}{{ 2 ** 10 }}{{ [1] + [2] }}{{ 3 + 4 * 2 }}",
     "abab1a-21024[1, 2]11"),
    ("{% set x %}a{{ 1 }}{% endset %}{{ x }}{% filter upper %}b{% endfilter %}{% for a, b in [(1, 2)] %}{{ b }}{% endfor %}",
     "a1B2"),
    ("{% for x in [1, [2, [3]]] recursive %}{{ loop(x) if x is not number else x }}{{ loop.depth0 }}{% endfor %}", "10213210"),
    ("{% for m in messages[::-1] if m.role == 'user' %}{{ loop.length }}{{ loop.last }}{% else %}none{% endfor %}", "1True"),
])
def test_what_templates_use(template, text):
    assert show(template, MESSAGES[1:2]).replace(" ", "") == text.replace(" ", "")


def test_the_date_is_what_the_caller_says():
    template = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% else %}26 Jul 2024{% endif %}"
    assert show(template) == "26 Jul 2024"
    for now in (datetime.datetime(2031, 2, 3, 4), datetime.date(2031, 2, 3)):
        assert show(template, now=now) == "03 Feb 2031"
    with pytest.raises(FormatError, match=r"give now=datetime\.datetime\.now\(\)"):
        show("{{ strftime_now('%Y') }}")
    with pytest.raises(ConfigError, match="now must be a datetime"):
        show(template, now="today")


def test_a_template_can_refuse():
    with pytest.raises(ConfigError, match="refuses these messages: roles must alternate"):
        show("{{ raise_exception('roles must alternate') }}")


# -- hostile ones ------------------------------------------------------------------------------------------------------------

BIG = "{% set a = 'a' * 100000 %}"
GROW = "{% set ns = namespace(s='xx', l=[1], m=[1]) %}{% for i in range(60) %}"
HOSTILE = {
    "loops in loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a long text": "{{ 'x' * 10 ** 9 }}", "turned round": "{{ 10 ** 9 * 'x' }}", "a long list": "{{ [0] * 10 ** 9 }}",
    "a large number": "{{ 10 ** 10 ** (10) }}{{ 99999 ** 99999 }}",
    "squares": "{% set ns = namespace(n=3) %}{% for i in range(60) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "doubling": GROW + "{% set ns.s = ns.s ~ ns.s %}{% endfor %}", "plus": GROW + "{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "blocks": GROW + "{% set t %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = t %}{% endfor %}",
    "lists in lists": GROW + "{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l }}",
    "compared": GROW + "{% set ns.l = [ns.l, ns.l] %}{% set ns.m = [ns.m, ns.m] %}{% endfor %}{{ ns.l == ns.m }}",
    "dicts": GROW + "{% set ns.l = dict(a=ns.l, b=ns.l) %}{% endfor %}{{ ns.l | tojson }}",
    "namespaces": GROW + "{% set ns.l = namespace(a=ns.l, b=ns.l) %}{% endfor %}{{ ns.l }}",
    "itself": "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "twice itself": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a loop itself": "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "wide": "{{ '%999999999d' % 1 }}", "wide by a star": "{{ '%*d' % (999999999, 1) }}",
    "replace": BIG + "{{ a.replace('a', a) }}", "the filter replace": BIG + "{{ a | replace('', a) }}",
    "join": BIG + "{{ a.join(a) }}", "the filter join": BIG + "{{ range(99999) | join(a) }}",
    "indent": "{{ ('\n' * 1000) | indent(10 ** 6) }}", "map": BIG + "{{ range(99999) | map('replace', '', a) | join }}",
    "searches": BIG + "{% for i in range(99999) %}{% if 'b' in a %}{% endif %}{% endfor %}",
    "slices": BIG + "{% for i in range(99999) %}{% set b = a[1:] %}{% endfor %}",
    "methods": BIG + "{% for i in range(99999) %}{% set b = a.upper() %}{% endfor %}",
    "sums": "{% for i in range(99999) %}{% set x = range(99999) | sum %}{% endfor %}",
    "its own text": "{% macro g() %}" + 9999 * "x" + "{% endmacro %}{% for i in range(99999) %}{% set a = g() %}{% endfor %}",
    "a filter": "{% filter upper %}{% for i in range(99999) %}" + 99 * "x" + "{% endfor %}{% endfilter %}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_stopped(name):
    start = time.process_time()
    with pytest.raises(FormatError, match="does more work than a template needs|calls itself without an end"):
        show(HOSTILE[name], MESSAGES[:1])
    assert time.process_time() - start < 15.0


@pytest.mark.parametrize("template", [
    "{{ ().__class__.__bases__[0].__subclasses__() }}", "{{ messages.__class__.__mro__ }}", "{{ ''.format.__self__ }}",
    "{{ '{0.__class__}'.format(1) }}", "{{ '' | attr('__class__') }}", "{{ raise_exception.__globals__.os }}",
    "{{ messages.append(1) }}", "{{ messages[0].update(a=1) }}", "{% include '/etc/passwd' %}", "{% import 'os' as os %}",
    "{{ lipsum(9) }}", "{{ cycler.__init__.__globals__ }}", "{{ self.__init__.__globals__ }}", "{{ 'x'.ljust(9) }}",
    "{{ range.__self__.__name__ }}", "{{ namespace.__init__.__globals__['sys'] }}", "{{ __turns.__globals__ }}",
    "{{ messages | map('__class__') | list }}", "{{ 'x' | center(10 ** 9) }}", "{% for %}", "{{ 'a' | nothing }}",
    "{{ x.y.z }}", "{{ 1 / 0 }}",
])
def test_the_sandbox_holds(template):
    messages = json.loads(json.dumps(MESSAGES))
    with pytest.raises(FormatError, match="chat template 'default'"):
        show(template, messages)
    assert messages == MESSAGES


def test_a_long_chat_is_no_attack():
    messages = [{"role": "user", "content": "word " * 2000}] * 200  # 2 million characters
    assert len(show(CHATML, messages)) > 1_900_000
    many = [{"role": "user", "content": "hi"}] * 30_000
    assert show(CHATML, many).count("im_end") == 30_000
    assert len(show("{{ messages | tojson }}", many)) > 900_000


# -- where they are ------------------------------------------------------------------------------------------------------------


def test_templates_in_files(tmp_path):
    assert templates_in(tmp_path, {}) == {} == templates_in(tmp_path, {"chat_template": None})
    assert templates_in(tmp_path, {"chat_template": "a"}) == {"default": "a"}
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    assert templates_in(tmp_path, {"chat_template": named}) == {"default": "a", "tool_use": "b"}
    (tmp_path / "chat_template.jinja").write_text("é", encoding="utf-8")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("r", encoding="utf-8")
    assert templates_in(tmp_path, {"chat_template": named}) == {"default": "é", "tool_use": "b", "rag": "r"}
    for wrong in ([1], [{"name": "a"}], 3, {"a": "b"}):
        with pytest.raises(FormatError, match=r"tokenizer_config\.json: chat_template is"):
            templates_in(tmp_path, {"chat_template": wrong})
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FormatError, match="no text in UTF-8"):
        templates_in(tmp_path, {})
    (tmp_path / "chat_template.jinja").write_bytes(b"x" * (2 << 20))
    with pytest.raises(FormatError, match="too many for a chat template"):
        templates_in(tmp_path, {})


def test_which_template():
    found, given = {"default": "d", "tool_use": "t"}, {"messages": []}
    assert render(found, None, dict(given)) == "d" and render(found, None, {**given, "tools": [{}]}) == "t"
    assert render(found, "tool_use", dict(given)) == "t" and render({"default": "d"}, None, {**given, "tools": [{}]}) == "d"
    with pytest.raises(ConfigError, match=r"no chat template 'rag', but 'default', 'tool_use'"):
        render(found, "rag", dict(given))
    with pytest.raises(FormatError, match="have no chat template"):
        render({}, None, dict(given))
    with pytest.raises(FormatError, match="too many for a chat template"):
        show("x" * (1 << 19))


def test_a_chat_through_a_tokenizer(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    from minilora.models import Tokenizer
    own = tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 0, "hi": 1, "[UNK]": 2}, unk_token="[UNK]"))
    own.add_special_tokens(["</s>"])
    own.save(str(tmp_path / "tokenizer.json"))
    settings = {"eos_token": "</s>", "chat_template": "{{ messages[0].content }}{{ eos_token }}{{ style }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    text = Tokenizer(tmp_path).chat([{"role": "user", "content": "hi"}], style="hi")
    assert text == "hi</s>hi" and Tokenizer(tmp_path).encode(text, special_tokens=False).ids == [[1, 0, 1]]


def test_without_jinja2(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(FileError, match="pip install jinja2"):
        show(CHATML)
