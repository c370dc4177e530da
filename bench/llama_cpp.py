"""llama.cpp as a peer, through the wheels xllamacpp and gguf: our weights in a GGUF file, run by its own server.

    write_gguf(model, "q8_0", path)
    (tokens,) = LlamaCpp(path, context=1024, threads=2)([[15, 7]], new_tokens=128)

The file holds what llama.cpp's architecture "gpt2" asks for, under its names: matrices of the type asked for,
positions, gains and biases in float32, as its own converter leaves them. The vocabulary is made up.
"""

import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import xllamacpp

from fastgpt.model.gpt import GPT

TYPES = {
    "f32": gguf.GGMLQuantizationType.F32,
    "f16": gguf.GGMLQuantizationType.F16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,  # 32 int8 and their float16 scale: 8.5 bits a weight
}
WORD, END = "w", "<|endoftext|>"  # token 15 is the word w15, so that a text says its tokens
SILENT = -1  # the verbosity below its log's first level
PARTS = {
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "ln_f": "output_norm",
}


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
    config = model.config
    weights = model.weights()
    vocab_size, C = weights["wte.weight"].shape
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(C)
    writer.add_feed_forward_length(4 * C)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(1e-5)
    _add_vocabulary(writer, vocab_size)
    for name, tensor in weights.items():
        matrix = tensor.dim() == 2 and name != "wpe.weight"
        kept = TYPES[kind if matrix else "f32"]
        array = np.ascontiguousarray(tensor.float().cpu().numpy())
        writer.add_tensor(gguf_name(name), gguf.quants.quantize(array, kept), raw_dtype=kept)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    """GPT-2's name of a parameter in GGUF's words: h.3.attn.c_attn.bias -> blk.3.attn_qkv.bias."""
    part, kind = name.rsplit(".", 1)
    if layer := re.match(r"h\.(\d+)\.", part):
        return f"blk.{layer[1]}.{PARTS[part[layer.end() :]]}.{kind}"
    return f"{PARTS[part]}.{kind}"


def _add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    """Made-up words and the end: enough to load, and to read tokens from a text; no prompt is ever spelled out."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*(f"{WORD}{id}" for id in range(size - 1)), END])
    writer.add_token_types([gguf.TokenType.NORMAL] * (size - 1) + [gguf.TokenType.CONTROL])
    writer.add_token_merges([f"{WORD} 0"])
    writer.add_bos_token_id(size - 1)
    writer.add_eos_token_id(size - 1)
    writer.add_add_bos_token(False)
