"""Chat templates render what transformers renders, and reach nothing outside their sandbox."""

import json

import pytest

from tests.serve.text.tokenizers_for_tests import make, save
from wager.errors import CheckpointError, UsageError
from wager.serve.text.chat_template import ChatTemplate, find_template, normalise_message
from wager.serve.text.tokenizer import Tokenizer

CHATML = (
    "{{ bos_token }}{% for message in messages %}\n    {{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' }}\n"
    "{% endfor %}\n{% if add_generation_prompt %}\n<|im_start|>assistant\n{% endif %}"
)
TOOLS_AND_CONTROLS = """{%- if tools %}
Tools: {{ tools | tojson(indent=2) }}
{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}
  {%- if message.role == 'system' %}{% continue %}{% endif %}
  {%- if loop.index0 > 6 %}{% break %}{% endif %}
  {%- set ns.last = loop.index0 %}
[{{ message.role }}] {{ message.content }}
  {%- if message.tool_calls %}
    {%- for call in message.tool_calls %}
<call>{{ {"name": call.function.name, "arguments": call.function.arguments} | tojson }}</call>
    {%- endfor %}
  {%- endif %}
{%- endfor %} last={{ ns.last }} eos={{ eos_token }}
{%- if add_generation_prompt %}
[assistant]{% endif %}"""
GENERATION = "{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}{{ message.content }}!{% endgeneration %}{% else %}{{ message.content }}{% endif %}{% endfor %}"
MESSAGES = [
    {"role": "system", "content": "Be <kind> & 'brief'."},
    {"role": "user", "content": "  Größe? 你好 😀 \n"},
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"q": "é", "n": [1, None]}}}]},
    {"role": "tool", "content": '{"ok": true}', "tool_call_id": "c1"},
    {"role": "assistant", "content": "It is big."},
]  # fmt: skip
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "description": 'd "q"',
            "parameters": {"type": "object", "properties": {"q": {"type": "string"}}},
        },
    }
]


@pytest.fixture(params=["CHATML", "TOOLS_AND_CONTROLS", "GENERATION"])
def both(request, tmp_path):
    """(ours, theirs) over one directory."""
    from transformers import PreTrainedTokenizerFast

    save(
        "byte-level",
        tmp_path,
        json.dumps({"bos_token": "<bos>", "eos_token": "<eos>", "chat_template": globals()[request.param]}),
    )
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    return Tokenizer.load(tmp_path), theirs


@pytest.mark.parametrize("count", [1, 2, 4, 5])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_renders_what_transformers_renders(both, count, add_generation_prompt, tools):
    ours, theirs = both
    options = dict(tools=tools, add_generation_prompt=add_generation_prompt)
    assert ours.render_chat(MESSAGES[:count], **options) == theirs.apply_chat_template(
        MESSAGES[:count], tokenize=False, **options
    )


@pytest.mark.parametrize("final", ["It is", "It is ", "  \n lead", "a\nb\n"])
def test_continues_the_final_message_as_transformers_does(both, final):
    ours, theirs = both
    messages = [{"role": "user", "content": "It is what?"}, {"role": "assistant", "content": final}]
    options = dict(add_generation_prompt=False, continue_final_message=True)
    want = theirs.apply_chat_template(messages, tokenize=False, **options)
    assert ours.render_chat(messages, **options) == want


def test_template_variables_reach_the_template():
    template = ChatTemplate("{{ 'think' if enable_thinking else 'quick' }}{{ custom }}")
    assert template.render([], enable_thinking=True, custom=3) == "think3"
    assert template.render([], enable_thinking=False) == "quick"


def test_dates_come_from_strftime_now():
    import datetime

    assert ChatTemplate("{{ strftime_now('%Y') }}").render([]) == str(datetime.datetime.now().year)


def test_messages_are_normalised():
    parts = [
        {"type": "text", "text": "a"},
        "b",
        {"type": "input_text", "text": "c"},
        {"type": "refusal", "refusal": "d"},
    ]
    assert normalise_message({"role": "developer", "content": parts}) == {"role": "system", "content": "abcd"}
    assert normalise_message({"role": "assistant", "content": None, "tool_calls": []}) == {
        "role": "assistant",
        "content": "",
    }
    call = {"id": "1", "function": {"name": "f", "arguments": '{"x": 1}'}}
    message = {"role": "assistant", "tool_calls": [call]}
    assert normalise_message(message)["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert call["function"]["arguments"] == '{"x": 1}', "the caller's message is left alone"


@pytest.mark.parametrize(
    ("message", "names"),
    [
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "image_url"),
        (
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{oops"}}]},
            "not JSON",
        ),
    ],
)
def test_messages_that_cannot_be_shown_are_refused(message, names):
    with pytest.raises(UsageError, match=names):
        ChatTemplate(CHATML).render([message])


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__ }}",
        "{{ (messages | attr('__class__')).__init__ }}",
        "{{ raise_exception.__globals__['os'].system('true') }}",
        "{{ strftime_now.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ lipsum.__globals__['__builtins__']['open']('/etc/passwd').read() }}",
        "{{ self._TemplateReference__context.__class__ }}",
        "{{ '{0.__class__.__base__}'.format(messages) }}",
        "{{ messages.append({'role': 'user'}) }}",
        "{{ messages[0].update({'content': 'x'}) }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ (1).__class__ ** 9 }}",
        "{{ raise_exception('no system prompt please') }}",
        "{{ 1 // 0 }}",
        "{{ messages[7].content.x }}",
        "{{ 'abc' | int(base=99) + [] }}",
        "{% macro loop() %}{{ loop() }}{% endmacro %}{{ loop() }}",
        "{{ strftime_now(3) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
    ],
)
def test_the_sandbox_refuses_tricks_and_failures_are_the_callers(source):
    """Attribute tricks end in a refusal or in nothing, never in an object of the machine; every failure is one clear error."""
    messages = [{"role": "user", "content": "hi"}]
    try:
        text = ChatTemplate(source).render(messages)
    except UsageError as error:
        assert "the chat template refuses these messages" in str(error)
    else:
        assert not text.strip(), text
    assert messages == [{"role": "user", "content": "hi"}]


def test_a_template_that_does_not_parse_says_where():
    with pytest.raises(CheckpointError, match="line 2"):
        ChatTemplate("fine\n{% for %}")


def test_continuing_needs_a_message_that_is_shown():
    with pytest.raises(UsageError, match="exclude each other"):
        ChatTemplate(CHATML).render(MESSAGES[:2], continue_final_message=True)
    with pytest.raises(UsageError, match="does not show the final message"):
        ChatTemplate("nothing").render(MESSAGES[:2], add_generation_prompt=False, continue_final_message=True)
    with pytest.raises(UsageError, match="no message"):
        ChatTemplate(CHATML).render([], add_generation_prompt=False, continue_final_message=True)


def test_where_a_template_is_found(tmp_path):
    def shown(config, override=None, messages=(), **options):
        return find_template(tmp_path, config, override).render(list(messages), **options)

    assert find_template(tmp_path, {}, None) is None
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}]
    assert shown({"chat_template": named}) == "plain" and shown({"chat_template": named}, tools=TOOLS) == "with tools"
    assert shown({"chat_template": "in config"}) == "in config"
    (tmp_path / "chat_template.jinja").write_text("in file")
    assert shown({"chat_template": "in config"}) == "in file"
    (tmp_path / "mine.jinja").write_text("the user's {{ messages | length }}")
    assert shown({}, str(tmp_path / "mine.jinja")) == "the user's 0"
    assert shown({}, "text {{ messages | length }}" + " " * 5000).startswith("text 0")


def test_a_template_of_the_users_own_serves(tiny_dir):
    from wager.serve.llm import LLM
    from wager.serve.params import SamplingParams

    llm = LLM(str(tiny_dir), chat_template="{% for m in messages %}<<{{ m.content }}>>{% endfor %}")
    output = llm.chat([{"role": "user", "content": "hi"}], SamplingParams(max_tokens=2, temperature=0.0))[0]
    assert output.prompt == "<<hi>>"
    assert output.prompt_token_ids == llm.get_tokenizer().encode("<<hi>>", add_special_tokens=False)


def test_special_tokens_of_the_checkpoint_are_known_to_the_template():
    tokenizer = make("byte-level")
    with_template = Tokenizer(
        tokenizer._backend,
        tokenizer._config,
        tokenizer.eos_token_ids,
        ChatTemplate("{{ bos_token }}|{{ eos_token }}|{{ pad_token }}"),
    )
    assert with_template.render_chat([{"role": "user", "content": "x"}]) == "<bos>|<eos>|"
