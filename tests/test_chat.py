"""Chat templates: equal to the Hugging Face recipe on what honest templates do, bounded on everything else."""

import json
import threading
import time
import tracemalloc
from typing import Any

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from localdepth.chat import ChatTemplate
from localdepth.errors import ModelFileError, PromptError, TemplateError

TIME_S = 2.0  # of one thread; the promise is one second, a slow machine may take two
MEMORY_BYTES = 256 << 20  # of Python objects alive at once, for messages of a few characters
HELLO = [{"role": "user", "content": "hi"}]

CHATML = """{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{%- if tools is not none or documents %}
    {{- raise_exception("no tools") }}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" ~ "Today Date: " ~ date_string ~ "\n\n" ~ system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""

MISTRAL = """{{ bos_token }}{% for message in messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {% endif %}
    {% if message['role'] == 'user' %}
        {{ '[INST] ' + message['content'] + ' [/INST]' }}
    {% elif message['role'] == 'assistant' %}
        {{ message['content'] + eos_token + ' ' }}
    {% else %}
        {{ raise_exception('Only user and assistant roles are supported!') }}
    {% endif %}
{% endfor %}"""

QWEN3 = """{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and
            not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}
            {{- '<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
        {%- else %}
            {{- content }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""

VARIETY = """{% macro turn(role, text='none', last=false) -%}
  <{{ role|upper }}{{ ' last' if last else '' }}>{{ text|replace('a', 'bb')|indent(2) }}
  {{ kwargs.extra }}{{ caller() if caller }}
{%- endmacro %}
{% set comma = joiner(', ') %}
{% for message in messages if message.content|length > 1 %}
  {% if loop.index > 4 %}{% break %}{% endif %}
  {{ comma() }}{{ turn(message.role, message.content, loop.last, extra=loop.cycle(1, 2)) }}
  {% call turn(message['role']) %}{{ message|tojson }}{% endcall %}
{% else %}
  nobody
{% endfor %}
{% set roles = messages|map(attribute='role')|unique|list %}
{{ roles|join('+') }} {{ roles|tojson(indent=2) }} {{ messages|selectattr('role', 'equalto', 'user')|list|count }}
{% set all %}{% for m in messages %}{{ m.content ~ loop.index ~ none ~ missing }}{% endfor %}{% endset %}
{{ all.replace('a', '').upper() }} {{ ', '.join(roles) }} {{ [1, 2, 3][::-1] }} {{ 7 // 2 + 2 ** 3 % 5 - 1 / 4 }}
{% with x = {'k': (1, 'é')} %}{{ x.k }}{% for key, value in x.items() %}{{ key }}={{ value }}{% endfor %}{% endwith %}
{% filter title %}end of {{ messages|length }} <messages>{% endfilter %}
"""
HONEST = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL, "qwen3": QWEN3, "variety": VARIETY}


def hugging_face(source: str) -> jinja2.Template:
    """The recipe of transformers, `utils/chat_template_utils.py`."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "bos_token": "<s>", "eos_token": "</s>"}
    return environment.from_string(source)


PUBLISHED = {name: hugging_face(source) for name, source in HONEST.items()}
OURS = {name: ChatTemplate(source, bos="<s>", eos="</s>") for name, source in HONEST.items()}


def render(source: str) -> str:
    return ChatTemplate(source).render(HELLO)


# --- honest templates -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HONEST)
@given(
    messages=st.lists(
        st.fixed_dictionaries(
            {
                "role": st.sampled_from(["user", "assistant", "system"]),
                "content": st.text(max_size=20) | st.just("<think>\nhm\n</think>\n\nyes, a banana"),
            }
        ),
        min_size=1,
        max_size=7,
    ),
    add_generation_prompt=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_rendering_equals_the_hugging_face_recipe(
    name: str, messages: list[dict[str, str]], add_generation_prompt: bool
) -> None:
    try:
        expected = PUBLISHED[name].render(
            messages=messages, add_generation_prompt=add_generation_prompt, tools=None, documents=None
        )
    except jinja2.TemplateError as error:
        with pytest.raises(TemplateError, match=str(error)):
            OURS[name].render(messages, add_generation_prompt=add_generation_prompt)
    else:
        assert OURS[name].render(messages, add_generation_prompt=add_generation_prompt) == expected


def test_chatml_renders_as_its_readers_expect() -> None:
    assert render(CHATML) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_generation_block_is_transparent() -> None:
    source = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}!"
    assert render(source) == "hi!"


def test_further_keys_of_a_message_reach_the_template() -> None:
    template = ChatTemplate("{{ messages[0].name }}")
    assert template.render([{"role": "user", "content": "", "name": "Ada"}]) == "Ada"


def test_date_of_today_is_available() -> None:
    assert render("{{ strftime_now('%Y') }}") == time.strftime("%Y")


def test_long_honest_conversation_fits_the_bounds() -> None:
    messages = [{"role": ("user", "assistant")[i % 2], "content": "word " * 100} for i in range(2000)]
    for source in (CHATML, QWEN3):
        assert len(ChatTemplate(source).render(messages)) > 1_000_000


def test_one_template_serves_many_threads() -> None:
    template = ChatTemplate(QWEN3)
    wrong: list[str] = []

    def work(name: str) -> None:
        messages = [{"role": "user", "content": name}] * 3
        wrong.extend(text for _ in range(20) if (text := template.render(messages)).count(name) != 3)

    threads = [threading.Thread(target=work, args=(f"<{i}>",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --- messages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "rule"),
    [
        ([], "at least one message"),
        ("hello", "at least one message"),
        (None, "at least one message"),
        ({"role": "user", "content": "hi"}, "at least one message"),
        (["hello"], "message 0 is str"),
        ([*HELLO, {"role": "user"}], "message 1 has no content"),
        ([{}], "no content and no role"),
        ([{"role": "user", "content": None}], "'content' of type NoneType"),
        ([{"role": "user", "content": [{"type": "text"}]}], "'content' of type list"),
        ([{"role": 1, "content": "hi"}], "'role' of type int"),
        ([{"role": "user", "content": "hi", 3: "x"}], "has 3 of type str"),
    ],
)
def test_messages_of_another_form_are_refused(messages: Any, rule: str) -> None:
    with pytest.raises(PromptError, match=rule):
        ChatTemplate(CHATML).render(messages)


def test_templates_refusal_carries_its_reason() -> None:
    with pytest.raises(TemplateError, match="refuses these messages: Only user and assistant"):
        ChatTemplate(MISTRAL).render([*HELLO, {"role": "system", "content": "x"}])


# --- templates that cannot be trusted ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "rule"),
    [
        ("{% if %}", "line 1"),
        ("\n\n{{ a b }}", "line 3"),
        ("{{ a|center(3) }}", "No filter named 'center'"),
        ("{{ '' | attr('__class__') }}", "No filter named 'attr'"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "cannot be compiled"),
        ("{% for a in b %}" * 60 + "{% endfor %}" * 60, "cannot be compiled"),
        ("{{ " + "9" * 10_000 + " }}", "cannot be compiled"),
        ("x" * 70_000, "over 65536"),
    ],
)
def test_what_is_no_template_is_refused(source: str, rule: str) -> None:
    with pytest.raises(ModelFileError, match=rule):
        ChatTemplate(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''['__class__']['__mro__'] }}",
        "{{ messages|map(attribute='__class__.__mro__')|list }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ 'a'.replace.func.__self__ }}",
        "{{ self._TemplateReference__context.environment.filters }}",
        "{{ messages[0].update(role='system') }}",
        "{{ messages.append(1) }}",
        "{{ dict.fromkeys('ab') }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ ''['format']('x') }}",
        "{{ '{a}'.format_map({'a': 1}) }}",
        "{{ '%s' % 1 }}",
        "{{ (1).to_bytes(9, 'big') }}",
        "{{ lipsum(n=1000) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ joiner.__init__.__globals__ }}",
        "{% macro f() %}{% endmacro %}{{ f.__call__.__globals__ }}",
        "{{ messages|map('upper')|first }}{{ (messages|map('upper')).gi_frame.f_back }}",
        "{% for m in messages %}{{ loop.__init__.__globals__ }}{% endfor %}",
        "{{ ' a '['strip']() }}",
        "{{ [1]|tojson(default=raise_exception.__globals__) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{% extends 'base' %}",
    ],
)
def test_template_cannot_leave_the_sandbox(source: str) -> None:
    with pytest.raises(TemplateError, match="failed"):
        render(source)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ ' a '.strip() ~ 'xax'.lstrip('x') ~ 'xax'.rstrip('x') }}", "aaxxa"),
        ("{{ 'a,b,c'.rsplit(',', 1)|join('|') ~ 'abab'.rfind('b') ~ 'a,b,c'.rpartition(',')[2] }}", "a,b|c3c"),
        ("{{ ' b '|trim ~ 'xcx'|trim('x') }}", "bc"),
        ("{{ [1]|tojson(indent='..') }}", "[\n..1\n]"),
        ("{{ range(9)|select('divisibleby', 4)|list ~ [1, 'a']|reject('string')|list }}", "[0, 4, 8][1]"),
    ],
)
def test_metered_methods_filters_and_tests_are_pythons(source: str, text: str) -> None:
    assert render(source) == text


LONG = "{% set s = 'a' * 1000000 %}"
GROW = "{% set ns = namespace(a='xy', l=[1], t=(1,), d={}) %}{% for i in range(100) %}"
EXPENSIVE = {
    "long range": "{% for i in range(10**9) %}{% endfor %}",
    "empty nested loops": "{% set r = range(100000) %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}",
    "loops in a block": "{% set x %}{% for i in range(99999) %}" + "y" * 60_000 + "{% endfor %}{% endset %}",
    "repeated text": "{{ 'a' * 10**9 }}",
    "repeated list": "{{ (10**9 * [1])|length }}",
    "big power": "{{ 10**(10**10) }}",
    "power of a power": "{{ (10**1000)**1000 }}",
    "big number from text": "{{ ('1' * 1000000)|int(0, 2) }}",
    "sum doubles": GROW + "{% set ns.a = ns.a + ns.a %}{% endfor %}",
    "tilde doubles": GROW + "{% set ns.a = ns.a ~ ns.a %}{% endfor %}",
    "block doubles": GROW + "{% set ns.a %}{{ ns.a }}{{ ns.a }}{% endset %}{% endfor %}",
    "list doubles": GROW + "{% set ns.l = ns.l + ns.l %}{% endfor %}",
    "nested list": GROW + "{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l }}",
    "nested tuple": GROW + "{% set ns.t = (ns.t, ns.t) %}{% endfor %}{{ {ns.t: 1} }}",
    "nested dict": GROW + "{% set ns.d = {'a': ns.d, 'b': ns.d} %}{% endfor %}{{ ns.d|tojson }}",
    "nested arguments": "{% macro f(n) %}{% set n.l = varargs %}{% endmacro %}"
    + GROW
    + "{{ f(ns, ns.l, ns.l) }}{% endfor %}{{ ns.l }}",
    "deep list": "{% set ns = namespace(a=1) %}{% for i in range(99999) %}{% set ns.a = [ns.a] %}{% endfor %}",
    "replace method": LONG + "{{ s.replace('a', s) }}",
    "replace filter": LONG + "{{ s|replace('a', s) }}",
    "replace nothing": LONG + "{{ s.replace('', s) }}",
    "join method": LONG + "{{ s.join(['x'] * 100000) }}",
    "join filter": LONG + "{{ (['x'] * 100000)|join(s) }}",
    "wide indent": "{{ 'a\nb'|indent(10**9) }}",
    "long indent": "{{ ('a\n' * 100000)|indent(10**5) }}",
    "wide json": "{{ [1]|tojson(indent=10**9) }}",
    "centred text": "{{ 'a'.center(10**9) }}",
    "tab stops": "{{ '\t'.expandtabs(10**9) }}",
    "format width": "{{ '{:>1000000000}'.format('a') }}",
    "percent width": "{{ '%1000000000d' % 1 }}",
    "endless macro": "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "branching macro": "{% macro f(n) %}{% if n %}{{ f(n-1) ~ f(n-1) }}{% endif %}{% endmacro %}{{ f(80) }}",
    "recursive loop": "{% for i in range(9) recursive %}{{ loop(range(9)) }}{% endfor %}",
    "many slices": LONG + "".join(f"{{% set a{i} = s[1:] %}}" for i in range(2500)),
    "many searches": LONG + "{% if (s ~ 'b') in s %}{% endif %}" * 1500,
    "many comparisons": "{% set a = [1] * 100000 %}{% set b = [1.0] * 100000 %}" + "{% if a == b %}{% endif %}" * 2000,
    "many splits": "{% for i in range(99999) %}{% set x = ('a ' * 500000).split() %}{% endfor %}",
    "many sorts": "{% for i in range(99999) %}{% set x = range(99999)|sort %}{% endfor %}",
    "long pipe": "{{ range(100000)" + "|map('string')" * 60 + "|list|length }}",
    "silent tests": "{{ range(100000)|select('in', ['x'] * 100000)|list }}",
    "strip a set": LONG + "{{ s.strip('b' * 999999 ~ 'a') }}",
    "trim a set": LONG + "{{ s|trim('b' * 999999 ~ 'a') }}",
    "search backwards": LONG + "{{ s.rfind('ab' ~ 'a' * 500000) }}",
    "split backwards": LONG + "{{ s.rsplit(maxsplit=1, sep='ab' ~ 'a' * 500000) }}",
    "json margin of text": "{{ [1]|tojson(indent='a' * 1000000) }}",
    "block in itself": "{% block a %}{{ self.a() ~ self.a() }}{% endblock %}",
    "caller of itself": "{% macro f() %}{{ caller() }}{% endmacro %}"
    + "{% macro g() %}{% call f() %}{{ g() }}{% endcall %}{% endmacro %}{{ g() }}",
}


@pytest.mark.parametrize("name", EXPENSIVE)
def test_expensive_template_ends_soon_in_an_error(name: str) -> None:
    template = ChatTemplate(EXPENSIVE[name])
    start = time.thread_time()
    with pytest.raises(TemplateError):
        template.render(HELLO)
    assert time.thread_time() - start < TIME_S


@pytest.mark.parametrize(
    "name", ["sum doubles", "list doubles", "many slices", "many splits", "many sorts", "nested dict"]
)
def test_expensive_template_stays_small(name: str) -> None:
    template = ChatTemplate(EXPENSIVE[name])
    tracemalloc.start()
    try:
        with pytest.raises(TemplateError):
            template.render(HELLO)
        assert tracemalloc.get_traced_memory()[1] < MEMORY_BYTES
    finally:
        tracemalloc.stop()


def test_namespaces_that_hold_each_other_print_no_tree() -> None:
    source = "{% set n0 = namespace() %}" + "".join(
        f"{{% set n{i + 1} = namespace(a=n{i}, b=n{i}) %}}" for i in range(60)
    )
    assert render(source + "{{ n60 }}{{ n60|upper }}{{ n60 is lower }}") == "<namespace><NAMESPACE>True"


@pytest.mark.parametrize(
    "source", ["{{ 1 / 0 }}", "{{ nobody.at.home }}", "{{ 1 + 'a' }}", "{{ messages|length|join }}"]
)
def test_failing_template_is_a_template_error(source: str) -> None:
    with pytest.raises(TemplateError, match="failed"):
        render(source)
