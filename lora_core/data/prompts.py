"""Messages and plain prompts -> token ids: the one way there, for training and for serving.

    prompt_ids(tokenizer, prompt)     what the server feeds
    rendered(tokenizer, messages)     the text of a chat, by the base's chat template
    text_ids(tokenizer, texts)        plain texts, begun as the tokenizer begins one, once, and not ended
    tokenised(tokenizer, texts)       what the tokenizer makes of the characters alone

A chat template is a program that came with the base: whatever goes wrong in it is one sentence.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from lora_core.data.messages import for_template

MOST_ADDED = 1_000_000  # characters that a template may write around messages; what it makes of them, ten times


class PromptError(ValueError):
    """A prompt that this base cannot be asked."""


class NoTemplateError(ValueError):
    """The base has no chat template that could be used, whatever the messages are."""


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] = (),
) -> list[int]:
    """Return the tokens that an answer follows: of a plain prompt, or of the messages of a chat, where the model may
    call `tools`.

    Raises:
        PromptError: there are none, or the chat template refuses the messages.
        NoTemplateError: messages, and no chat template for them, or for tools.
    """
    if not isinstance(prompt, str):
        return tokenised(tokenizer, [rendered(tokenizer, prompt, generation_prompt=True, tools=tools)])[0]
    (ids,) = text_ids(tokenizer, [prompt])
    if not ids:
        raise PromptError("the prompt is empty")
    return ids


def rendered(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    *,
    generation_prompt: bool,
    tools: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Render messages by the chat template.

    Raises:
        PromptError: it refuses them, or fails.
        NoTemplateError: there is none, it is no template, or it shows no tools or no calls where there are some.
    """
    template = chat_template(tokenizer, tools=bool(tools))
    shown = [for_template(message) for message in messages]
    if tools and not re.search(r"\btools\b", template):
        raise NoTemplateError("the base model's chat template shows no tools; leave tools out")
    if "tool_calls" not in template and any("tool_calls" in message for message in shown):
        raise NoTemplateError("the base model's chat template shows no calls; write them into `content`")
    what = f"the first {len(shown)} messages" if len(shown) > 1 else "the first message"
    try:
        text = str(
            tokenizer.apply_chat_template(
                shown,
                tools=list(map(dict, tools)) or None,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=generation_prompt,
            )
        )
    except TemplateSyntaxError as error:
        raise NoTemplateError(f"the base model's chat template cannot be read ({_reason(error)})") from error
    except TemplateError as error:
        raise PromptError(f"the chat template refuses {what} ({_reason(error)})") from error
    except Exception as error:  # of any type, as in any program
        reason = f"{type(error).__name__}: {_reason(error)}"
        raise PromptError(f"the chat template fails on {what} ({reason})") from error
    if len(text) > MOST_ADDED + 10 * (sum(len(message["content"]) for message in shown) + len(str(tools))):
        raise PromptError(f"the chat template makes {len(text):,} characters of {what}")
    return text


def text_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Tokenise plain texts that a model goes on from: with the tokens that the tokenizer puts before a text, which a
    text may have already, and without those that it puts behind one.
    """
    first = _first_tokens(tokenizer)
    found = []
    for ids in tokenised(tokenizer, texts):
        while first and ids[: len(first)] == first:
            ids = ids[len(first) :]
        found.append(first + ids)
    return found


def tokenised(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
    """Tokenise each text; with `special` the tokens that the tokenizer puts around a text are among them."""
    if not texts:
        return []
    # verbose: it would warn of texts longer than the model's context, which others deal with
    encoding = tokenizer(list(texts), add_special_tokens=special, return_attention_mask=False, verbose=False)
    ids: list[list[int]] = encoding["input_ids"]
    return ids


def _first_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    (bare,), (whole,) = (tokenised(tokenizer, ["a"], special=special) for special in (False, True))
    return whole[: next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)]


def chat_template(tokenizer: PreTrainedTokenizerBase, *, tools: bool = False) -> str:
    """Return the template for chats, or for those with tools, where there are several.

    Raises:
        NoTemplateError: there is none.
    """
    template: Any = tokenizer.chat_template
    if isinstance(template, dict) and template:
        name = "tool_use" if tools and "tool_use" in template else "default"
        if name not in template:
            names = ", ".join(sorted(map(str, template)))
            raise NoTemplateError(f"the base model has several chat templates ({names}) and none is named default")
        template = template[name]
    if not template:
        raise NoTemplateError("the base model has no chat template for messages")
    if not isinstance(template, str):
        raise NoTemplateError("the base model's chat template cannot be read (it is no text)")
    return template


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
