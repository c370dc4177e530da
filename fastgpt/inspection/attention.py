"""Attention maps: the weights by which each head mixes the values of earlier tokens, and what the model predicts.

    from fastgpt.inspection import attention_maps
    found = attention_maps(fastgpt.load("out"), "The with statement")
    found.maps[layer, head, query]  # the weights of a query, which sum to 1

Fast backends never hold these weights. So `observe` runs a second model, of the reference backend, whose attention
passes its weights on. It computes in float32 and shares the first model's weights where they are float32 as well.
"""

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from fastgpt.data import packing
from fastgpt.errors import UsageError
from fastgpt.generation.generator import TextGenerator
from fastgpt.generation.request import Prompt, prompt_tokens
from fastgpt.inspection.shapes import ShapeRecorder
from fastgpt.model.gpt import GPT
from fastgpt.ops import table
from fastgpt.system.units import counted
from fastgpt.tokenizer.base import Tokenizer
from fastgpt_kernels import reference

MOST_TOKENS = 4096  # one layer's maps of as many tokens and 16 heads take 1 GiB
See = Callable[[int, torch.Tensor], None]  # is called with a layer, and with its weights (H, T, T)


@dataclass(frozen=True)
class AttentionMaps:
    """Attention maps and predictions of a model over a text: arrays on the host.

    They are float32, or float64 for a model in float64.

    Attributes:
        tokens: int64 (T,), the ids of the text.
        texts: T of them, what each token says; see `token_text`.
        documents: int64 (T,), each token's document, for a model that was trained on packed ones; None for others.
        maps: (L, H, T, T), the weight that a query (third axis) gives a key (fourth). Each row sums to 1, and is
            exactly 0 for later keys and for those of other documents.
        probabilities: (T, V), of the token after each position.
    """

    tokens: np.ndarray
    texts: tuple[str, ...]
    documents: np.ndarray | None
    maps: np.ndarray
    probabilities: np.ndarray


@dataclass(frozen=True)
class Observation:
    """The states of a model while it read a text.

    Attributes:
        model: the model itself, of the reference backend in float32.
        streams: (L + 1, T, C), the residual stream: embeddings, then what each block made of it.
        hidden: (T, C), the last of them normalized, from which `model.logits` predicts.
        shapes: of the tensors on the way; see `fastgpt.inspection.shapes`.
    """

    model: GPT
    streams: torch.Tensor
    hidden: torch.Tensor
    shapes: ShapeRecorder


def attention_maps(generator: TextGenerator, text: Prompt) -> AttentionMaps:
    """The attention maps of a text, and the probabilities of the tokens that follow.

    Args:
        text: a text, in which <|endoftext|> stands for that token if the vocabulary has it, or token ids.

    Raises:
        UsageError: no token, more than the model's context or `MOST_TOKENS`, or an unknown character.
    """
    tokens = token_ids(generator.tokenizer, generator.model, text)
    documents = document_ids(generator, tokens)
    maps: list[torch.Tensor] = []
    with torch.no_grad():
        seen = observe(generator.model, tokens, documents, lambda _, weights: maps.append(weights.cpu()))
        probabilities = seen.model.logits(seen.hidden).softmax(-1)
    return AttentionMaps(
        tokens=tokens.numpy(),
        texts=tuple(token_text(generator.tokenizer, token) for token in tokens.tolist()),
        documents=None if documents is None else documents.numpy(),
        maps=torch.stack(maps).numpy(),
        probabilities=probabilities.cpu().numpy(),
    )


def token_ids(tokenizer: Tokenizer, model: GPT, text: Prompt, setting: str = "text") -> torch.Tensor:
    """The tokens of a text, int64 (T,) on the host. Raises `UsageError` as `attention_maps` does."""
    if not len(text):
        raise UsageError(f"`{setting}` is empty; give the model a token or more to read")
    ids = tokenizer.encode_special(text).tolist() if isinstance(text, str) else text
    tokens = torch.tensor(prompt_tokens(ids, tokenizer, model.config.known_vocab))
    T, context = len(tokens), model.config.block_size
    if context < T:
        raise UsageError(f"`{setting}` has {counted(T, 'token')}, and the model's context is {context:,}; shorten it")
    if T > MOST_TOKENS:
        raise UsageError(f"`{setting}` has {T:,} tokens, and maps are drawn of at most {MOST_TOKENS:,}; shorten it")
    return tokens


def document_ids(generator: TextGenerator, tokens: torch.Tensor) -> torch.Tensor | None:
    """The document of each token, int64 (T,), if the model was trained on packed ones."""
    end = generator.tokenizer.end_token if generator.packed else None
    found = packing.document_ids(tokens[None], end)
    return None if found is None else found[0]


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token to show: its text or, if its bytes are no whole characters, those as escapes; a special token's name."""
    content = tokenizer.token_bytes(token)
    names = [name for name, id in tokenizer.special_tokens.items() if id == token]
    return names[0] if names else content.decode("utf-8", "backslashreplace")


def observe(model: GPT, tokens: torch.Tensor, documents: torch.Tensor | None, see: See) -> Observation:
    """Read a text, and pass each layer's attention weights to `see`, which may drop what it does not need.

    Args:
        tokens, documents: int64 (T,).
    """
    layers, recorder = itertools.count(), ShapeRecorder()

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options) -> torch.Tensor:
        weights = reference.attention_weights(q, k, scale=options.get("scale"), doc_ids=options.get("doc_ids"))
        y = reference.causal_attention(q, k, v, **options)
        recorder.note(q=q, k=k, weights=weights, mixed=y)
        see(next(layers), weights[0])
        return y

    ops = dataclasses.replace(table.resolve("reference", model.device), causal_attention=attention)
    observed = _with_weights_of(model, recorder.watch_norms(ops))
    streams = _record_streams(observed)
    recorder.watch_modules(observed)
    documents = None if documents is None else documents[None].to(model.device)
    with torch.no_grad():
        hidden = observed.hidden(tokens[None].to(model.device), documents)
        recorder.note(tokens=tokens[None], hidden=hidden)
        logits = observed.logits(hidden[:, -1:])  # of one token, as those of all may be gigabytes
        recorder.found["logits"] = (*hidden.shape[:2], logits.shape[-1])
        return Observation(observed, torch.cat(streams), hidden[0], recorder)


def _with_weights_of(model: GPT, ops: table.Ops) -> GPT:
    """A model of other operations with the same weights: not copied if they are float32 (or float64) already."""
    with torch.device("meta"):
        other = GPT(model.config, ops)
    tensors = model.state_dict()

    def weight(name: str) -> torch.Tensor:
        tensor = tensors[name]
        wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        return wide if tensor.dtype != torch.int8 else wide * tensors[name.replace("weight", "scale")][:, None]

    other.load_state_dict({name: weight(name) for name, _ in other.named_parameters()}, assign=True)
    other.table = model.table
    return other.eval().requires_grad_(False)


def _record_streams(model: GPT) -> list[torch.Tensor]:
    """A list that each forward pass fills with the residual stream before and after each block, (1, T, C) each."""
    streams: list[torch.Tensor] = []

    def before(module: torch.nn.Module, inputs: tuple) -> None:
        streams.append(inputs[0])

    def after(module: torch.nn.Module, inputs: tuple, output: tuple) -> None:
        streams.append(output[0] + output[1])

    model.h[0].register_forward_pre_hook(before)
    for block in model.h:
        block.register_forward_hook(after)
    return streams
