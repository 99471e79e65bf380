"""Chat templates render as transformers renders them, and can neither leave the sandbox nor run or grow without end."""

import re
import time
from datetime import datetime

import pytest

from edge_moe.chat import render_chat
from edge_moe.errors import FormatError, OptionError

DEEPSEEK_V2 = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{{ bos_token }}"
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token }}"
    "{% elif message['role'] == 'system' %}{{ message['content'] + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
DEEPSEEK_V3 = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{% set ns = namespace(is_first=false, is_tool=false, is_output_first=true, system_prompt='') %}"
    "{%- for message in messages %}{%- if message['role'] == 'system' %}"
    "{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}{{bos_token}}{{ns.system_prompt}}"
    "{%- for message in messages %}{%- if message['role'] == 'user' %}{%- set ns.is_tool = false -%}"
    "{{'<｜User｜>' + message['content']}}{%- endif %}"
    "{%- if message['role'] == 'assistant' and message['content'] is none %}{%- set ns.is_tool = false -%}"
    "{%- for tool in message['tool_calls']%}{%- if not ns.is_first %}"
    "{{'<｜Assistant｜><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + "
    "tool['function']['name'] + '\n' + '```json' + '\n' + tool['function']['arguments'] + '\n' + '```' + "
    "'<｜tool▁call▁end｜>'}}{%- set ns.is_first = true -%}{%- else %}"
    "{{'\n' + '<｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + tool['function']['name'] + '\n' + "
    "'```json' + '\n' + tool['function']['arguments'] + '\n' + '```' + '<｜tool▁call▁end｜>'}}"
    "{{'<｜tool▁calls▁end｜><｜end▁of▁sentence｜>'}}{%- endif %}{%- endfor %}{%- endif %}"
    "{%- if message['role'] == 'assistant' and message['content'] is not none %}{%- if ns.is_tool %}"
    "{{'<｜tool▁outputs▁end｜>' + message['content'] + '<｜end▁of▁sentence｜>'}}{%- set ns.is_tool = false -%}"
    "{%- else %}{% set content = message['content'] %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}{%- endif %}{%- endif %}"
    "{%- if message['role'] == 'tool' %}{%- set ns.is_tool = true -%}{%- if ns.is_output_first %}"
    "{{'<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>'}}"
    "{%- set ns.is_output_first = false %}{%- else %}"
    "{{'\n<｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>'}}{%- endif %}{%- endif %}"
    "{%- endfor -%}{% if ns.is_tool %}{{'<｜tool▁outputs▁end｜>'}}{% endif %}"
    "{% if add_generation_prompt and not ns.is_tool %}{{'<｜Assistant｜>'}}{% endif %}"
)
LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + "
    "'<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# On several lines, as people write them: which line breaks and spaces stay is decided by trim_blocks and lstrip_blocks.
CHATML = """\
{% for message in messages %}
    {% if loop.first and messages[0]['role'] != 'system' %}
<|im_start|>system
You are a helpful assistant.<|im_end|>
    {% endif %}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""
MOONLIGHT = (
    "{%- for message in messages -%}{%- if loop.first and messages[0]['role'] != 'system' -%}"
    "<|im_system|>system<|im_middle|>You are a helpful assistant provided by Moonshot-AI.<|im_end|>{%- endif -%}"
    "{%- if message['role'] == 'system' -%}<|im_system|>{%- endif -%}"
    "{%- if message['role'] == 'user' -%}<|im_user|>{%- endif -%}"
    "{%- if message['role'] == 'assistant' -%}<|im_assistant|>{%- endif -%}"
    "{{ message['role'] }}<|im_middle|>{{message['content']}}<|im_end|>{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}"
)
MESSAGES = [
    {"role": "user", "content": "Hi! "},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "1 < 2 & 'x'?"},
]
SYSTEM = [{"role": "system", "content": "Be brief."}, *MESSAGES[2:]]
TOOLS = [
    {"role": "user", "content": "weather?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "get", "arguments": '{"city": "Rom"}'}}],
    },
    {"role": "tool", "content": "sunny"},
    {"role": "assistant", "content": "<think>hm</think>Sunny."},
]

# Each expected text is what transformers 5 renders.
EXPECTED = [
    (
        DEEPSEEK_V2,
        MESSAGES,
        "<bos>User: Hi! \n\nAssistant: Hello.<eos>User: 1 < 2 & 'x'?\n\nAssistant:",
    ),
    (DEEPSEEK_V2, SYSTEM, "<bos>Be brief.\n\nUser: 1 < 2 & 'x'?\n\nAssistant:"),
    (
        DEEPSEEK_V3,
        SYSTEM + MESSAGES[1:],
        "<bos>Be brief.<｜User｜>1 < 2 & 'x'?<｜Assistant｜>Hello.<｜end▁of▁sentence｜>"
        "<｜User｜>1 < 2 & 'x'?<｜Assistant｜>",
    ),
    (
        DEEPSEEK_V3,
        TOOLS,
        "<bos><｜User｜>weather?<｜Assistant｜><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get\n"
        '```json\n{"city": "Rom"}\n```<｜tool▁call▁end｜><｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>sunny'
        "<｜tool▁output▁end｜><｜tool▁outputs▁end｜><think>hm</think>Sunny.<｜end▁of▁sentence｜><｜Assistant｜>",
    ),
    (
        LLAMA_3,
        MESSAGES[:2],
        "<bos><|start_header_id|>user<|end_header_id|>\n\nHi!<|eot_id|><|start_header_id|>assistant<|end_header_id|>"
        "\n\nHello.<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    (
        CHATML,
        MESSAGES[2:],
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n1 < 2 & 'x'?<|im_end|>\n"
        "<|im_start|>assistant\n",
    ),
    (
        MOONLIGHT,
        MESSAGES[2:],
        "<|im_system|>system<|im_middle|>You are a helpful assistant provided by Moonshot-AI.<|im_end|>"
        "<|im_user|>user<|im_middle|>1 < 2 & 'x'?<|im_end|><|im_assistant|>assistant<|im_middle|>",
    ),
]


def render(template, messages=(), **options):
    return render_chat(template, list(messages), bos_token="<bos>", eos_token="<eos>", **options)


@pytest.mark.parametrize(("template", "messages", "expected"), EXPECTED)
def test_templates_of_known_models(template, messages, expected):
    assert render(template, messages) == expected


def test_without_a_generation_prompt():
    assert render(MOONLIGHT, MESSAGES[2:], add_generation_prompt=False).endswith("'x'?<|im_end|>")
    assert render(DEEPSEEK_V2, MESSAGES[2:], add_generation_prompt=False) == "<bos>User: 1 < 2 & 'x'?\n\n"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ tools }} {{ documents }} {{ unknown }}.", "None None ."),
        ("{% if tools %}a{% else %}b{% endif %}", "b"),
        ("{{ thinking }}{{ bos_token }}", "True<bos>"),
        ("{{ {'a': 'é<&', 'b': [1, none]}|tojson }}", '{"a": "é<&", "b": [1, null]}'),
        ("{{ {'b': 1, 'a': 2}|tojson(indent=1) }}", '{\n "b": 1,\n "a": 2\n}'),
        ("{{ {'b': 1, 'a': 2}|tojson(sort_keys=true, separators=(',', ':')) }}", '{"a":2,"b":1}'),
        ("{{ 12345678901|tojson }} {{ 5000000|default(1) }}", "12345678901 5000000"),
        (
            "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}{% if i > 3 %}{% break %}{% endif %}{{ i }}"
            "{% endfor %}",
            "023",
        ),
        ("{% generation %}kept{% endgeneration %}", "kept"),
        (
            "{% for x in 'abc' %}{{ loop.index }}/{{ loop.length }}{{ x }}{{ ',' if not loop.last }}{% endfor %}",
            "1/3a,2/3b,3/3c",
        ),
        ("{% for k, v in {'a': 1}.items() %}{{ k ~ v }}{% endfor %}", "a1"),
        ("{% set a, b = 'x', 'y' %}{{ a ~ b ~ 1 ~ none ~ unknown }}", "xy1None"),
        ("{% macro m(x) %}[{{ x }}]{% endmacro %}{{ m(1) + m('b') }}", "[1][b]"),
        ("{% set ns = namespace(n=0) %}{% for i in [1, 2] %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}", "3"),
        ("{{ 'a,b'.split(',')|join('-') }}{{ '%s=%d' % ('x', 2) }}{{ '{}!'.format(3) }}", "a-bx=23!"),
        ("{{ [{'r': 1}, {'r': 2}]|selectattr('r', 'equalto', 2)|map(attribute='r')|list }}", "[2]"),
        ("  {% if true %}\n  x\n  {% endif %}\ny", "  x\ny"),
        ("{{ '<b>' }}{{ 7 // 2 ** 1 }}", "<b>3"),
    ],
)
def test_what_templates_may_use(template, expected):
    assert render(template, MESSAGES, thinking=True) == expected


def test_the_date_is_todays():
    assert render("{{ strftime_now('%Y') }}") in {str(datetime.now().year), datetime.now().strftime("%Y")}


def test_a_refusal_by_the_template_is_an_option_error():
    with pytest.raises(OptionError, match="refuses these messages: Roles must alternate user/assistant"):
        render("{{ raise_exception('Roles must\n alternate user/assistant') }}", MESSAGES)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("a\n{% foo %}", "error in line 2: Encountered unknown tag 'foo'"),
        ("{{ ", "error in line 1"),
        ("{% if %}", "error in line 1"),
        ("{{ messages[7]['role'] + 1 }}", "UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ 'a' + 1 }}", "TypeError"),
        ("{% include 'x' %}", "fails"),
        ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "too deeply"),
        ("{{ 'x'|urlize }}", "No filter named 'urlize'"),
    ],
)
def test_broken_templates_give_one_line(template, message):
    with pytest.raises(FormatError, match=message) as caught:
        render(template, MESSAGES)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__ }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__code__ }}",
        "{{ (1).__class__.__base__.__subclasses__() }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ ''|attr('__class__')|attr('mro')() }}",
        "{{ self._TemplateReference__context }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
        "{{ messages[0].pop('role') }}",
    ],
)
def test_the_sandbox_holds(template):
    messages = [dict(message) for message in MESSAGES]
    try:
        rendered = render(template, messages)
    except FormatError as error:
        assert re.search("unsafe|undefined|not safely callable", str(error))
    else:
        assert rendered in ("", "None")
    assert messages == MESSAGES


BIG = (
    "{% set ns = namespace(x=START) %}{% for i in range(99) %}{% set ns.x = STEP %}{% endfor %}{{ ns.x|string|length }}"
)


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in 'x' * 999 %}{% for b in 'x' * 999 %}{% for c in 'x' * 999 %}{% endfor %}{% endfor %}{% endfor %}",
        "{% for a in range(9999) %}" + "x" * 500_000 + "{% endfor %}",
        "{% set x %}{% for a in range(9999) %}" + "x" * 500_000 + "{% endfor %}{% endset %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for i in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
        "{{ range(10**9)|list|length }}",
        "{{ 'a' * 10**9 }}",
        "{{ 10**9 * [1] }}",
        "{{ 10**10**10 }}",
        "{{ 'a'|center(10**9) }}",
        "{{ 'a'.ljust(10**9) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%*d' % (10**9, 1) }}",
        "{{ '{:>1000000000}'.format(1) }}",
        "{{ {'a': 1}|tojson(indent=10**9) }}",
        BIG.replace("START", "'ab'").replace("STEP", "ns.x ~ ns.x"),
        BIG.replace("START", "'ab'").replace("STEP", "ns.x + ns.x"),
        BIG.replace("START", "'ab'").replace("STEP", "ns.x|replace('a', ns.x)"),
        BIG.replace("START", "'ab'").replace("STEP", "ns.x.replace('a', ns.x)"),
        BIG.replace("START", "'ab'").replace("STEP", "ns.x.join(['a', 'b', 'c'])"),
        BIG.replace("START", "'ab'").replace("STEP", "'%s%s' % (ns.x, ns.x)"),
        BIG.replace("START", "[1]").replace("STEP", "[ns.x, ns.x]"),
        BIG.replace("START", "[1]").replace("STEP", "(ns.x, ns.x)"),
        BIG.replace("START", "[1]").replace("STEP", "{'a': ns.x, 'b': ns.x}"),
        BIG.replace("START", "[1]").replace("STEP", "dict(a=ns.x, b=ns.x)"),
        BIG.replace("START", "[1]").replace("STEP", "namespace(a=ns.x, b=ns.x)"),
        BIG.replace("START", "[1]").replace("STEP", "ns.x + ns.x"),
        BIG.replace("START", "10").replace("STEP", "ns.x * ns.x"),
        BIG.replace("START", "10").replace("STEP", "ns.x ** 9"),
        "x" * 1_000_001,
    ],
    ids=lambda template: template[:40],
)
def test_templates_cannot_run_or_grow_without_end(template):
    start = time.process_time()
    with pytest.raises(FormatError, match=r"too much|too deeply|Range too big|expected at most"):
        render(template, MESSAGES)
    assert time.process_time() - start < 20


def test_a_long_conversation_is_no_trouble():
    messages = [{"role": role, "content": "word " * 200} for role in ("user", "assistant")] * 500
    assert len(render(DEEPSEEK_V3, messages)) > 1_000_000
