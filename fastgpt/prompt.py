"""What is to be continued: text or token ids, checked."""

from collections.abc import Sequence

from fastgpt.errors import UsageError
from fastgpt.tokenizer import Tokenizer
from fastgpt.units import counted

Prompt = str | Sequence[int]


def prompt_tokens(prompt: Prompt, tokenizer: Tokenizer | None, vocab_size: int) -> list[int]:
    """The ids of a prompt, at least one: an empty one begins with the tokenizer's start token.

    Raises:
        UsageError: neither text nor ids, an id outside the vocabulary, a character that the tokenizer does not know,
            or text, or nothing, without a tokenizer.
    """
    if isinstance(prompt, str):
        if tokenizer is None:
            raise UsageError("a prompt of text needs a tokenizer; pass token ids instead")
        tokens = tokenizer.encode(prompt).tolist()
    else:
        tokens = _whole_numbers(prompt)
        unknown = next((token for token in tokens if not 0 <= token < vocab_size), None)
        if unknown is not None:
            raise UsageError(f"token {unknown} is outside the vocabulary of {counted(vocab_size, 'token')}")
    if tokens:
        return tokens
    if tokenizer is None:
        raise UsageError("an empty prompt needs a tokenizer, which knows what to start from; pass a token id")
    return [tokenizer.start_token]


def _whole_numbers(prompt: Sequence[int]) -> list[int]:
    try:
        return [token.__index__() for token in prompt]
    except (AttributeError, TypeError):
        raise UsageError(f"a prompt is text or a list of token ids, not {prompt!r:.60}") from None
