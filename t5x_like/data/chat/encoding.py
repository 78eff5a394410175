"""Token ids of dialogues: with the mask of the assistant's turns, or as a pair of past and answer for each turn."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from t5x_like.config.corpus import CorpusConfig
from t5x_like.data.chat.messages import ASSISTANT, ROLE, AnsweredDialogue, Dialogue, parse_dialogue, parse_preference
from t5x_like.data.chat.template import PLAIN, ChatTemplate, Rendered
from t5x_like.data.tokenizers.huggingface import HuggingFaceTokenizer
from t5x_like.data.tokenizers.tokenizer import Tokenizer
from t5x_like.errors import DataError

Sequences = list[npt.NDArray[Any]]
EOS = "</s>"
"""Name of EOS in the texts of a tokenizer whose special tokens have no names."""


def load_template(tokenizer: Tokenizer, path: str | None) -> ChatTemplate:
    """Return the chat template of a file or else of a tokenizer, or `PLAIN` if the tokenizer has none.

    Raises:
      DataError: the file cannot be read, or is no template.
    """
    published = isinstance(tokenizer, HuggingFaceTokenizer)
    names = _token_names(tokenizer.config) if isinstance(tokenizer, HuggingFaceTokenizer) else {"eos_token": EOS}
    if path is not None:
        try:
            return ChatTemplate(Path(path).read_text(encoding="utf-8"), names, path)
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read ({error}), expected a chat template") from None
    source: Any = None
    if isinstance(tokenizer, HuggingFaceTokenizer):
        source = tokenizer.files.get("chat_template.jinja") or tokenizer.config.get("chat_template")
        if isinstance(source, list):  # Several templates by name, as older versions of transformers wrote them.
            named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
            source = named.get("default")
    if isinstance(source, str):
        return ChatTemplate(source, names, "the tokenizer's chat template")
    if published and "eos_token" not in names:
        found = "a tokenizer without a chat template and without the name of EOS"
        raise DataError(f"found {found}, expected one of the two; set --data.corpus.chat-template")
    return ChatTemplate(PLAIN, names, "the plain chat template")


class DialogueEncoder:
    """Encoder of the dialogues of a corpus.

    Attributes:
      template: The chat template.
    """

    def __init__(self, tokenizer: Tokenizer, corpus: CorpusConfig):
        self._tokenizer = tokenizer
        self._as_turns = corpus.messages_as == "turns"
        self._has_answers = corpus.rejected_field is not None
        self.template = load_template(tokenizer, corpus.chat_template)

    def sequences(self, text: str) -> list[Sequences]:
        """Return the sequences of each example of a dialogue, which `messages.dialogue_text` wrote.

        A dialogue is one example of two sequences: its ids, and 1 for each that the loss covers. As turns, each answer
        is an example: the ids of the past, and of the answer without EOS. A dialogue with two answers, which
        `messages.preference_text` wrote, is one example of three sequences: the ids before the answers, and of the two
        answers. In a single stream the answers include what the template writes at their end.
        """
        if self._has_answers:
            return [self._answered(parse_preference(text))]
        dialogue = parse_dialogue(text)
        if self._as_turns:
            return [list(pair) for pair in self._turns(dialogue)]
        ids, mask = encode_rendered(self._tokenizer, self.template.dialogue(dialogue.messages, dialogue.tools))
        return [[np.array(ids, np.int32), np.array(mask, np.int32)]]

    def _answered(self, pair: AnsweredDialogue) -> Sequences:
        """Return the ids before the answers, and of both answers.

        Raises:
          DataError: the template refuses the messages, or the ids before the answers depend on the answer.
        """
        messages, tools = pair.dialogue
        answers = (pair.chosen, pair.rejected)
        if self._as_turns:
            past = self.template.render(messages, tools, add_generation_prompt=True)
            parts = [encode_rendered(self._tokenizer, past)[0]]
            parts += [list(self._tokenizer.encode(answer["content"])) for answer in answers]
            return [np.array(ids, np.int32) for ids in parts]
        prompts, ends = [], []
        for answer in answers:
            whole = self.template.dialogue([*messages, answer], tools)
            # The mask of the last answer alone: what the assistant wrote before is a part of the prompt.
            ids, mask = encode_rendered(self._tokenizer, whole._replace(spans=whole.spans[-1:]))
            first, last = mask.index(1), len(mask) - mask[::-1].index(1)
            prompts.append(ids[:first])
            ends.append(ids[first:last])
        if prompts[0] != prompts[1]:
            raise DataError(
                f"found a prompt whose tokens depend on the answer: {pair.dialogue.messages[-1].get('content')!r:.80}, "
                "expected a chat template that ends the prompt with a token of its own; name one by "
                "--data.corpus.chat-template"
            )
        return [np.array(ids, np.int32) for ids in (prompts[0], *ends)]

    def _turns(self, dialogue: Dialogue) -> list[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
        pairs = []
        for index, message in enumerate(dialogue.messages):
            if message[ROLE] == ASSISTANT and message.get("content"):
                past = self.template.render(dialogue.messages[:index], dialogue.tools, add_generation_prompt=True)
                given, _ = encode_rendered(self._tokenizer, past)
                if not isinstance(message["content"], str):
                    found = type(message["content"]).__name__
                    raise DataError(f"found an answer whose content is of type {found}, expected a text")
                answer = self._tokenizer.encode(message["content"])
                pairs.append((np.array(given, np.int32), np.array(answer, np.int32)))
        return pairs


def encode_rendered(tokenizer: Tokenizer, rendered: Rendered) -> tuple[list[int], list[int]]:
    """Return the ids of a rendered dialogue, and 1 for each id of the assistant's parts.

    For a published tokenizer, both equal those of transformers' `apply_chat_template` with
    `return_assistant_tokens_mask`. Another tokenizer encodes the assistant's parts on their own, and `EOS` is its id.
    """
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return tokenizer.encode_with_spans(rendered.text, rendered.spans)
    ids: list[int] = []
    mask: list[int] = []
    position = 0
    for start, stop in (*rendered.spans, (len(rendered.text), len(rendered.text))):
        for part, value in ((rendered.text[position:start], 0), (rendered.text[start:stop], 1)):
            for number, piece in enumerate(part.split(EOS)):
                own = [*([tokenizer.eos_id] if number else []), *(tokenizer.encode(piece) if piece else [])]
                ids += own
                mask += [value] * len(own)
        position = stop
    return ids, mask


def _token_names(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the names of the special tokens in a tokenizer_config.json, such as {"eos_token": "</s>"}."""
    names = {}
    for field, value in config.items():
        content = value.get("content") if isinstance(value, dict) else value
        if field.endswith("_token") and isinstance(content, str):
            names[field] = content
    return names
