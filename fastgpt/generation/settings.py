"""Checks settings that are given by name; their types are for checkers such as pyright."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from fastgpt.config.fields import check_names, validate
from fastgpt.config.generation import SamplingParams
from fastgpt.generation.compiled_decoder import CompiledDecoder


class SamplingSettings(TypedDict, total=False):
    """The fields of `SamplingParams`, in the forms that it accepts."""

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    stop: str | Sequence[str]
    stop_tokens: int | Sequence[int]
    logprobs: int | None
    candidates: bool
    num_samples: int
    seed: int


class EngineOptions(TypedDict, total=False):
    """The options of an `Engine`, beside a model and its tokenizer."""

    max_batch: int
    max_batch_tokens: int
    page_size: int
    kv_memory: int | None
    prefix_cache: bool
    speculate: str
    slide: bool
    compile: bool
    decoder: CompiledDecoder | None
    cuda_graphs: bool


def sampling(given: Mapping[str, Any], defaults: SamplingParams | None = None) -> SamplingParams:
    """The defaults with the given settings. Raises `UsageError` for an unknown name or a value outside its limits."""
    check_names(given, [field.name for field in dataclasses.fields(SamplingParams)])
    params = dataclasses.replace(defaults or SamplingParams(), **given)
    validate(params)
    return params
