"""llama.cpp as a peer, through the wheels xllamacpp and gguf: our weights in a GGUF file, run by its own server.

    write_gguf(model, "q8_0", path)
    (tokens,) = LlamaCpp(path, context=1024, threads=2)([[15, 7]], new_tokens=128)

The file is one of ours with a vocabulary that is made up.
"""

import functools
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import xllamacpp

from fastgpt.interchange.gguf_export import write_file
from fastgpt.model.gpt import GPT

TYPES = {"f32": "float32", "f16": "float16", "q8_0": "q8_0"}
WORD, END = "w", "<|endoftext|>"  # token 15 is the word w15, so that a text says its tokens
SILENT = -1  # the verbosity below its log's first level


class LlamaCpp:
    """A GGUF model in llama.cpp on the CPU; the file is not needed any more."""

    def __init__(self, path: Path, context: int, threads: int):
        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel = str(path), context, 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.n_gpu_layers, params.fit_params, params.verbosity = 0, False, SILENT
        # Read into memory, not mapped: 10 to 20% faster where it was tried.
        params.load_mode = xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_NONE
        self.server = xllamacpp.Server(params)
        self._rates: list[float] = []

    def __call__(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        """The greedy continuations, one after the other, each of `new_tokens`."""
        return [self._continue(list(prompt), new_tokens) for prompt in prompts]

    def facts(self) -> dict[str, dict[str, Any]]:
        """Its tokens/s of decoding by its own clock, without the prompt, the first token, and Python; its build."""
        rates = {"decode_tokens_per_second": statistics.median(self._rates)} if self._rates else {}
        return {"llama_cpp": rates | {"build": system_info()}}

    def _continue(self, prompt: list[int], new_tokens: int) -> list[int]:
        request = {
            "prompt": prompt,
            "n_predict": new_tokens,
            "temperature": 0.0,
            "samplers": ["top_k"],
            "top_k": 1,
            "ignore_eos": True,
            "cache_prompt": False,
        }
        answer = self.server.handle_completions(request)
        if new_tokens > 1:
            self._rates.append(answer["timings"]["predicted_per_second"])
        return [int(word) for word in re.findall(rf"{WORD}(\d+)", answer["choices"][0]["text"])]


def system_info() -> str:
    """The instructions that this build of llama.cpp uses, in one line, such as "AVX2, FMA"."""
    return ", ".join(re.findall(r"(\w+) = 1", xllamacpp.get_system_info()))


def write_gguf(model: GPT, kind: str, path: Path) -> None:
    """The model's weights as a GGUF file with matrices of a kind in `TYPES`."""
    weights = model.weights()
    add = functools.partial(_add_vocabulary, len(weights["wte.weight"]))
    write_file(path, model.config, weights, TYPES[kind], add)


def _add_vocabulary(size: int, writer: gguf.GGUFWriter) -> None:
    """Made-up words and the end: enough to load, and to read tokens from a text; no prompt is ever spelled out."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*(f"{WORD}{id}" for id in range(size - 1)), END])
    writer.add_token_types([gguf.TokenType.NORMAL] * (size - 1) + [gguf.TokenType.CONTROL])
    writer.add_token_merges([f"{WORD} 0"])
    writer.add_bos_token_id(size - 1)
    writer.add_eos_token_id(size - 1)
    writer.add_add_bos_token(False)
