"""Messages and plain prompts -> token ids: the one way there, for training and for serving.

    prompt_ids(tokenizer, prompt)     what the server feeds
    rendered(tokenizer, messages)     the text of a chat, by the base's chat template
    text_ids(tokenizer, texts)        plain texts, begun as the tokenizer begins one, once, and not ended
    tokenised(tokenizer, texts)       what the tokenizer makes of the characters alone

A chat template is a program that came with the base: whatever goes wrong in it is one sentence.
"""

from __future__ import annotations

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


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the tokens that an answer follows: of a plain prompt, or of the messages of a chat.

    Raises:
        PromptError: there are none, or the chat template refuses the messages.
        NoTemplateError: messages, and no chat template for them.
    """
    if not isinstance(prompt, str):
        return tokenised(tokenizer, [rendered(tokenizer, prompt, generation_prompt=True)])[0]
    (ids,) = text_ids(tokenizer, [prompt])
    if not ids:
        raise PromptError("the prompt is empty")
    return ids


def rendered(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], *, generation_prompt: bool
) -> str:
    """Render messages by the chat template.

    Raises:
        PromptError: it refuses them, or fails.
        NoTemplateError: there is none, or it is no template.
    """
    template = _template(tokenizer)
    shown = [for_template(message) for message in messages]
    what = f"the first {len(shown)} messages" if len(shown) > 1 else "the first message"
    try:
        text = str(
            tokenizer.apply_chat_template(
                shown, chat_template=template, tokenize=False, add_generation_prompt=generation_prompt
            )
        )
    except TemplateSyntaxError as error:
        raise NoTemplateError(f"the base model's chat template cannot be read ({_reason(error)})") from error
    except TemplateError as error:
        raise PromptError(f"the chat template refuses {what} ({_reason(error)})") from error
    except Exception as error:  # of any type, as in any program
        reason = f"{type(error).__name__}: {_reason(error)}"
        raise PromptError(f"the chat template fails on {what} ({reason})") from error
    if len(text) > MOST_ADDED + 10 * sum(len(message["content"]) for message in shown):
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


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the template for chats, where there are several."""
    template: Any = tokenizer.chat_template
    if isinstance(template, dict) and template:
        if "default" not in template:
            names = ", ".join(sorted(map(str, template)))
            raise NoTemplateError(f"the base model has several chat templates ({names}) and none is named default")
        template = template["default"]
    if not template:
        raise NoTemplateError("the base model has no chat template for messages")
    if not isinstance(template, str):
        raise NoTemplateError("the base model's chat template cannot be read (it is no text)")
    return template


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
