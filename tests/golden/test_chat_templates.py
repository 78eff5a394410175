"""Ids and masks of dialogues equal transformers' `apply_chat_template` with `return_assistant_tokens_mask`."""

import pytest

from t5x_like.config import CorpusConfig
from t5x_like.data.chat.encoding import DialogueEncoder
from t5x_like.data.chat.messages import dialogue_text
from t5x_like.data.tokenizers.published import load_published
from t5x_like.errors import DataError

transformers = pytest.importorskip("transformers", reason="parity with transformers needs the hf extra")
from helpers.published_models import byte_level_bpe  # noqa: E402

pytestmark = pytest.mark.hf

HEAD = "{%- if tools %}{{ '<|im_start|>tools\n' }}{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{% endif -%}"
BODY = """
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}{% generation %}{{ message.content }}
        {%- for call in message.tool_calls or [] %}{{ call | tojson }}{% endfor %}{{- '<|im_end|>' }}{% endgeneration %}
        {{- '\n' }}
    {%- elif message.role == 'bad' %}
        {{- raise_exception('no such role') }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
MARKED = HEAD + BODY
UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
TOOLS = [{"type": "function", "function": {"name": "météo", "parameters": {"city": {"type": "string"}}}}]
CALL = {"type": "function", "function": {"name": "météo", "arguments": {"city": "Paris"}}}
DIALOGUES = {
    "several turns": [
        {"role": "user", "content": "Where is Paris?"},
        {"role": "assistant", "content": "In France."},
        {"role": "user", "content": "And Rome?"},
        {"role": "assistant", "content": "In Italy — “la città eterna” 🙂"},
    ],
    "system": [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": "2 + 2"},
        {"role": "assistant", "content": " four"},
    ],
    "tools": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": '{"t": 21}'},
        {"role": "assistant", "content": "21 degrees"},
        {"role": "user", "content": "Thanks"},
    ],
}


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    tokenizer = byte_level_bpe(eos_token="<|im_end|>", pad_token="<|pad|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = MARKED
    folder = tmp_path_factory.mktemp("chat")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", DIALOGUES)
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_ids_and_masks_equal_transformers(tokenizer_dir, name, tools):
    theirs = transformers.AutoTokenizer.from_pretrained(tokenizer_dir)
    expected = theirs.apply_chat_template(
        DIALOGUES[name], tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    encoder = DialogueEncoder(load_published(tokenizer_dir, 0), CorpusConfig(messages_field="messages"))
    row = {"messages": DIALOGUES[name], "tools": tools}
    ((ids, mask),) = encoder.sequences(dialogue_text(row, "messages", lambda: "row"))
    assert ids.tolist() == expected["input_ids"]
    assert mask.tolist() == expected["assistant_masks"] and 0 < mask.sum() < len(mask)


@pytest.mark.parametrize("name", DIALOGUES)
def test_a_template_without_marks_gives_the_same_masks(tokenizer_dir, tmp_path, name):
    """The assistant's parts are found by rendering the dialogue up to each turn."""
    tokenizer = load_published(tokenizer_dir, 0)
    (tmp_path / "template.jinja").write_text(UNMARKED)
    text = dialogue_text({"messages": DIALOGUES[name]}, "messages", lambda: "row")
    found = []
    for path in (None, str(tmp_path / "template.jinja")):
        encoder = DialogueEncoder(tokenizer, CorpusConfig(messages_field="messages", chat_template=path))
        assert encoder.template.marks_assistant == (path is None)
        found.append([part.tolist() for part in encoder.sequences(text)[0]])
    assert found[0] == found[1]


def test_templates_run_in_a_sandbox_and_their_refusals_are_shown(tokenizer_dir, tmp_path):
    tokenizer = load_published(tokenizer_dir, 0)
    encoder = DialogueEncoder(tokenizer, CorpusConfig(messages_field="messages"))
    with pytest.raises(DataError, match="refuses the messages .no such role"):
        encoder.template.render([{"role": "bad", "content": ""}])
    path = tmp_path / "evil.jinja"
    path.write_text("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    encoder = DialogueEncoder(tokenizer, CorpusConfig(messages_field="messages", chat_template=str(path)))
    with pytest.raises(DataError, match="refuses the messages"):
        encoder.template.render(DIALOGUES["system"])
    path.write_text("{% for %}")
    with pytest.raises(DataError, match="found no chat template"):
        DialogueEncoder(tokenizer, CorpusConfig(messages_field="messages", chat_template=str(path)))
