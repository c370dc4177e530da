"""Other engines that generate with the weights of our model, where they are installed.

    peers, left_out = make_peers(["llama.cpp f32", "transformers float32"], model)
    continuations = peers["llama.cpp f32"]([[15, 7]], 128)

Each is a callable: prompts of token ids, how many new tokens -> the greedy continuations, none of which ends early.
transformers runs on the model's device, llama.cpp and ctranslate2 in processes of their own on the CPU, on as many
threads as PyTorch has. The model is of GPT-2's kind: learned positions and biases.
"""

import importlib.util
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.peers.apart import Apart, Maker, Peer, Tokens
from fastgpt.model.gpt import GPT

PACKAGES = {
    "llama.cpp": ("xllamacpp", "gguf"),
    "ctranslate2": ("ctranslate2",),
    "transformers": ("transformers",),
}


def make_peers(names: Iterable[str], model: GPT) -> tuple[dict[str, Peer], list[str]]:
    """The peers of these names with the model's weights, and the names of those that are not installed.

    A name is an engine and a type: "llama.cpp f32", f16 or q8_0; "ctranslate2 float32" or int8; "transformers float32"
    or bfloat16, with "static" behind it for a static cache and a compiled step.
    """
    peers, left_out = {}, []
    for name in names:
        engine, *kind = name.split(" ")
        if all(map(installed, PACKAGES[engine])):
            make = MAKERS[engine]
            peers[name] = make(model, *kind) if engine == "transformers" else Apart(name, make, model, *kind)
        else:
            left_out.append(name)
    return peers, left_out


def own_facts(peers: Mapping[str, Peer]) -> dict[str, Any]:
    """The settings that the peers report."""
    return {name: value for peer in peers.values() if isinstance(peer, Apart) for name, value in peer.facts().items()}


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def make_llama_cpp(model: GPT, threads: int, kind: str) -> Peer:
    from bench.peers import llama_cpp

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{kind}.gguf"
        llama_cpp.write_gguf(model, kind, path)
        return llama_cpp.LlamaCpp(path, model.config.block_size, threads)


class Transformers:
    """transformers' GPT2LMHeadModel on the model's device; prompts of unequal lengths are padded on the left."""

    def __init__(self, model: GPT, dtype: str, cache: str | None = None):
        """cache: "static" also has transformers compile its step, on a GPU."""
        import transformers

        config = model.config
        weights = model.weights()
        settings = transformers.GPT2Config(
            vocab_size=len(weights["wte.weight"]),
            n_positions=config.block_size,
            n_embd=config.n_embd,
            n_layer=config.n_layer,
            n_head=config.n_head,
            bos_token_id=None,
            eos_token_id=None,  # so that nothing ends early
            pad_token_id=0,
        )
        self.device = model.wte.weight.device
        with self.device:
            self.model: Any = transformers.GPT2LMHeadModel(settings).to(getattr(torch, dtype)).eval()
        with torch.no_grad():
            for name, parameter in self.model.transformer.named_parameters():
                transposed = name.startswith("h.") and parameter.dim() == 2  # as (inputs, outputs)
                parameter.copy_(weights[name].t() if transposed else weights[name])
        self.options: dict[str, Any] = {} if cache is None else {"cache_implementation": cache}

    def __call__(self, prompts: Sequence[Tokens], new_tokens: int) -> list[list[int]]:
        longest = max(map(len, prompts))
        tokens = torch.zeros(len(prompts), longest, dtype=torch.int64)
        mask = torch.zeros_like(tokens)
        for row, prompt in enumerate(prompts):
            tokens[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        answers = self.model.generate(
            tokens.to(self.device),
            attention_mask=mask.to(self.device),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            **self.options,
        )
        return answers[:, longest:].tolist()


class Ctranslate2:
    """ctranslate2 on the CPU, its weights in `kind`: float32 or int8 (with float32 arithmetic between)."""

    def __init__(self, model: GPT, threads: int, kind: str):
        import ctranslate2

        vocab_size = len(model.weights()["wte.weight"])
        self.words = [*(f"w{id}" for id in range(vocab_size - 1)), "<|endoftext|>"]
        with tempfile.TemporaryDirectory() as parent:
            folder = str(Path(parent) / "model")
            spec = ctranslate2_spec(model, self.words)
            spec.validate()
            spec.optimize(quantization=kind)
            Path(folder).mkdir()
            spec.save(folder)
            self.generator = ctranslate2.Generator(
                folder, device="cpu", compute_type=kind, intra_threads=threads, inter_threads=1
            )

    def __call__(self, prompts: Sequence[Tokens], new_tokens: int) -> list[list[int]]:
        """One after the other: in a batch it gives what exceeds the shortest prompt as a part of the answer."""
        answers = self.generator.generate_batch(
            [[self.words[token] for token in prompt] for prompt in prompts],
            max_length=new_tokens,
            min_length=new_tokens,
            include_prompt_in_result=False,
            max_batch_size=1,
        )
        return [answer.sequences_ids[0] for answer in answers]


def ctranslate2_spec(model: GPT, words: list[str]) -> Any:
    """Our weights as ctranslate2's description of a decoder: its converter's work, without files between."""
    from ctranslate2.specs import common_spec, transformer_spec

    config = model.config
    spec: Any = transformer_spec.TransformerDecoderModelSpec.from_config(
        config.n_layer, config.n_head, pre_norm=True, activation=common_spec.Activation.GELUTanh
    )
    weights = {name: tensor.float().cpu() for name, tensor in model.weights().items()}

    def norm(target: Any, name: str) -> None:
        target.gamma = weights[f"{name}.weight"]
        target.beta = weights[f"{name}.bias"]

    def linear(target: Any, name: str) -> None:
        target.weight = weights[f"{name}.weight"]
        target.bias = weights[f"{name}.bias"]

    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = decoder.projection.weight = weights["wte.weight"]
    decoder.position_encodings.encodings = weights["wpe.weight"]
    norm(decoder.layer_norm, "ln_f")
    for i, layer in enumerate(decoder.layer):
        norm(layer.self_attention.layer_norm, f"h.{i}.ln_1")
        linear(layer.self_attention.linear[0], f"h.{i}.attn.c_attn")
        linear(layer.self_attention.linear[1], f"h.{i}.attn.c_proj")
        norm(layer.ffn.layer_norm, f"h.{i}.ln_2")
        linear(layer.ffn.linear_0, f"h.{i}.mlp.c_fc")
        linear(layer.ffn.linear_1, f"h.{i}.mlp.c_proj")
    spec.register_vocabulary(words)
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = words[-1]
    return spec


MAKERS: dict[str, Maker] = {
    "llama.cpp": make_llama_cpp,
    "ctranslate2": Ctranslate2,
    "transformers": Transformers,
}
