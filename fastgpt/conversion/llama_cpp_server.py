"""llama.cpp's own server, of the wheel xllamacpp, in a process of its own: `llama_cpp.py` starts this file.

It may end its process when it dislikes a file, and its OpenMP would slow PyTorch's. Nothing of fastgpt is imported. The
first line on stdout is the server's address; it serves until stdin ends.
"""

import importlib
import sys
from typing import Any

ERRORS = 1  # the level of its log that holds them only


def serve(path: str, context: int, threads: int, key: str) -> None:
    """Load a GGUF file, and answer who knows the key. Attention is computed and cached in float32."""
    xllamacpp: Any = importlib.import_module("xllamacpp")  # its names have no types
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = path, context, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.n_gpu_layers, params.fit_params, params.warmup, params.verbosity = 0, False, False, ERRORS
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.cache_ram_mib = 0  # no caches of earlier prompts besides the one in use
    params.api_keys = [key]  # by default it listens on 127.0.0.1, at any free port
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.stdin.readline().strip())
