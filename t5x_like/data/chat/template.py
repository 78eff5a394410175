"""Chat templates: the text of a dialogue, and the parts of it that the assistant wrote.

A template is a Jinja program of somebody else's, so it runs in Jinja's sandbox, without access to files, modules or the
attributes of Python objects. They follow transformers: `messages`, `tools`, `add_generation_prompt` and the
names of the special tokens are its variables, and `{% generation %} ... {% endgeneration %}` marks what the assistant
wrote. The current time is not available (`strftime_now` is undefined), so that a store does not depend on the day.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from t5x_like.data.chat.messages import ASSISTANT, ROLE
from t5x_like.errors import DataError

Messages = Sequence[Mapping[str, Any]]

PLAIN = (
    "{% for message in messages %}{{ message['role'] + ': ' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
"""Template of a tokenizer that brings none: each message after its role, those of the assistant ended by EOS."""


class Rendered(NamedTuple):
    """Text of a dialogue.

    Attributes:
      text: The text with the special tokens by name.
      spans: (start, stop) in characters of each part that the assistant wrote.
    """

    text: str
    spans: tuple[tuple[int, int], ...]


class _Tracker(Extension):
    """The tag `generation`, whose contents are the assistant's."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_block"), [], [], body).set_lineno(line)

    def _block(self, caller: Callable[[], str]) -> str:
        text = caller()
        blocks, spans = self.environment.__dict__["chat_state"]
        start = sum(map(len, blocks))
        spans.append((start, start + len(text)))
        return text


class ChatTemplate:
    """Compiled chat template.

    Attributes:
      source: The Jinja program.
      marks_assistant: The template marks what the assistant wrote by `{% generation %}`.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], name: str):
        """Compile a template.

        Args:
          source: The Jinja program.
          special_tokens: Names of special tokens, such as {"eos_token": "</s>"}.
          name: Origin of the template, for messages.

        Raises:
          DataError: the template is no Jinja program.
        """
        self._name, self._tokens = name, dict(special_tokens)
        self.source = source
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Tracker, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        self._environment = environment
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, SyntaxError, RecursionError, MemoryError, OverflowError, ValueError) as error:
            # Python's compiler, which Jinja calls, has limits of its own.
            raise DataError(f"{name}: found no chat template ({error}), expected a Jinja program") from None
        self.marks_assistant = "endgeneration" in source

    def render(
        self, messages: Messages, tools: Sequence[Any] | None = None, *, add_generation_prompt: bool = False
    ) -> Rendered:
        """Return the text of a dialogue with the spans that the template marks.

        Raises:
          DataError: the template refuses the messages.
        """
        blocks: list[str] = []
        spans: list[tuple[int, int]] = []
        self._environment.__dict__["chat_state"] = (blocks, spans)
        variables = {"messages": messages, "tools": tools, "documents": None, **self._tokens}
        try:
            for block in self._template.generate(add_generation_prompt=add_generation_prompt, **variables):
                blocks.append(block)
            text = "".join(blocks)
            text.encode()  # A template can write half of a surrogate pair.
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
            RecursionError,
            MemoryError,
        ) as error:
            raise DataError(f"{self._name}: the chat template refuses the messages ({error})") from None
        return Rendered(text, tuple(spans))

    def dialogue(self, messages: Messages, tools: Sequence[Any] | None = None) -> Rendered:
        """Return the text of a whole dialogue with the spans of all assistant turns.

        The spans of a template that marks none are found by rendering the dialogue up to each turn.

        Raises:
          DataError: the template refuses the messages, or renders earlier turns differently when later ones follow.
        """
        whole = self.render(messages, tools)
        if self.marks_assistant:
            return whole
        spans = []
        for index, message in enumerate(messages):
            if message.get(ROLE) != ASSISTANT:
                continue
            before = self.render(messages[:index], tools, add_generation_prompt=True).text
            until = self.render(messages[: index + 1], tools).text
            if not (whole.text.startswith(until) and until.startswith(before)):
                raise DataError(
                    f"{self._name}: found a chat template that renders turn {index + 1} differently within its "
                    "dialogue, expected one whose text only grows; mark the assistant's part by {% generation %} in a "
                    "template of your own and name it by data.corpus.chat_template"
                )
            # White space after the end of a turn separates it from the next one.
            spans.append((len(before), max(len(until.rstrip()), len(before))))
        return Rendered(whole.text, tuple(spans))


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
