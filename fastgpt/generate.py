"""Generate text from a trained run: prefill the prompt, decode token by token.

    python -m fastgpt.generate --prompt "The with statement"

Python: `fastgpt.load("out").generate("The with statement")`.
"""

import codecs
import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from fastgpt import checkpoint, cli, dispatch, run_folder, tokenizer
from fastgpt.config import CACHES, GenerateConfig, SamplingParams, validate
from fastgpt.device import resolve_device, resolve_weights_dtype, synchronize
from fastgpt.errors import UsageError
from fastgpt.kv_cache import DenseCache
from fastgpt.model import GPT
from fastgpt.sampler import Sampler
from fastgpt.tokenizer import Tokenizer


class TextGenerator:
    """A model and its tokenizer: text in, text out."""

    def __init__(self, model: GPT, tokenizer: Tokenizer):
        self.model, self.tokenizer = model, tokenizer

    def generate(self, prompt: str = "", *, cache: str = "dense", **settings: Any) -> str:
        """The continuation of the prompt, without the prompt itself. See `stream`."""
        return "".join(self.stream(prompt, cache=cache, **settings))

    def stream(self, prompt: str = "", *, cache: str = "dense", **settings: Any) -> "Generation":
        """The continuation piece by piece, as it comes.

        Args:
            prompt: any text; an empty one starts at the tokenizer's start token.
            cache: "dense" keeps keys and values, "none" computes them anew for every token.
            settings: fields of `SamplingParams`; `stop` may be one text or several.

        Raises:
            UsageError: a setting outside its limits, or a character that the tokenizer does not know.
        """
        if isinstance(stop := settings.get("stop", ()), str):
            settings["stop"] = (stop,)
        elif isinstance(stop, list):
            settings["stop"] = tuple(stop)
        params = SamplingParams(**settings)
        validate(params)
        if cache not in CACHES:
            raise UsageError(f"cache {cache!r} is not one of {', '.join(CACHES)}")
        return Generation(self, prompt, params, cache)


class Generation:
    """One continuation under way: iterate for its pieces of text; the counters are right at every moment.

    Attributes:
        prefill_tokens, prefill_seconds: of the prompt, or of its end that fits in block_size.
        decode_tokens, decode_seconds: of the new tokens after the first, which the prefill yields.
    """

    def __init__(self, generator: TextGenerator, prompt: str, params: SamplingParams, cache: str):
        self.model, self.tokenizer, self.params = generator.model, generator.tokenizer, params
        self.cached = cache == "dense"
        self.prompt = self.tokenizer.encode(prompt).tolist() or [self.tokenizer.start_token]
        self.prefill_tokens, self.prefill_seconds = min(len(self.prompt), self.model.config.block_size), 0.0
        self.decode_tokens, self.decode_seconds = 0, 0.0
        self._pieces = self._text()

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def tokens(self) -> Iterator[int]:
        """The new tokens, one by one, without regard to stop texts."""
        weight = self.model.wte.weight
        tokens = torch.tensor([self.prompt], device=weight.device)
        sampler = Sampler(self.params, tokens, self.tokenizer.vocab_size)
        cache = DenseCache(self.model.config, device=weight.device, dtype=weight.dtype) if self.cached else None
        for i in range(self.params.max_new_tokens):
            began = time.perf_counter()
            with torch.inference_mode():
                token = sampler(self._logits(tokens, cache))
                # The oldest tokens are out of every window to come.
                tokens = torch.cat([tokens, token], dim=1)[:, -self.model.config.block_size - 1 :]
            value = int(token)
            self._count(i, time.perf_counter() - began)
            yield value

    def _logits(self, tokens: torch.Tensor, cache: DenseCache | None) -> torch.Tensor:
        """The next token's logits (1, V), from the last block_size tokens."""
        block = self.model.config.block_size
        if cache is None:
            return self.model(tokens[:, -block:], last_only=True)[:, -1]
        if cache.length == 0 or cache.length == block:
            # Every token's position changes as the window slides, and with it all that is cached.
            cache.clear()
            return self.model(tokens[:, -block:], cache=cache, last_only=True)[:, -1]
        return self.model(tokens[:, -1:], cache=cache, last_only=True)[:, -1]

    def _count(self, index: int, seconds: float) -> None:
        if index == 0:
            self.prefill_seconds = seconds
        else:
            self.decode_tokens += 1
            self.decode_seconds += seconds

    def _text(self) -> Iterator[str]:
        """Decode bytes to text as they become whole, and end before a stop text."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        pending = ""
        for token in self.tokens():
            pending += decoder.decode(self.tokenizer.token_bytes(token))
            ends = [at for stop in self.params.stop if stop and (at := pending.find(stop)) >= 0]
            if ends:
                yield pending[: min(ends)]
                return
            held = _could_begin(self.params.stop, pending)
            if ready := pending[: len(pending) - held]:
                yield ready
            pending = pending[len(pending) - held :]
        if rest := pending + decoder.decode(b"", final=True):
            yield rest


def _could_begin(stops: Sequence[str], text: str) -> int:
    """How many last characters of `text` may be the beginning of a stop text."""
    longest = max((len(stop) for stop in stops), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0


def load(
    out_dir: str | Path = "out",
    *,
    checkpoint_name: str = "best",
    device: str = "auto",
    dtype: str = "auto",
    kernels: str = "auto",
) -> TextGenerator:
    """The generator of a trained run, from its best checkpoint unless told otherwise.

    Raises:
        UsageError: no run there, a corrupt checkpoint, or an unknown device.
    """
    out_dir, where = Path(out_dir), resolve_device(device)
    step_dir = checkpoint.find(out_dir, checkpoint_name)
    config, about = run_folder.load(out_dir)
    recorded = about.get("columns") if about.get("device") == where.type else None
    ops = dispatch.resolve(kernels, where, recorded=recorded)
    weights_dtype = resolve_weights_dtype(dtype, where, interpreted=ops.interpreted)
    vocabulary = tokenizer.load(out_dir / "tokenizer.json")
    checkpoint.verify(step_dir, (checkpoint.MODEL, checkpoint.STATE))
    checkpoint.check_vocabulary(step_dir, vocabulary)
    config = dataclasses.replace(config, vocab_size=vocabulary.vocab_size)
    weights = checkpoint.load_weights(step_dir)
    return TextGenerator(GPT.from_weights(config, ops, weights, where, weights_dtype), vocabulary)


def read_prompt(text: str) -> str:
    """The prompt that --prompt names: the text itself, FILE:path, or - for stdin."""
    if text == "-":
        return _decode(sys.stdin.buffer.read(), "stdin")
    if not text.startswith("FILE:"):
        return text
    path = Path(text.removeprefix("FILE:"))
    try:
        return _decode(path.read_bytes(), str(path))
    except OSError as error:
        raise UsageError(f"--prompt {text}: {path} cannot be read: {error.strerror}") from None


def _decode(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"--prompt: {name} is not UTF-8: byte {error.start} is 0x{content[error.start]:02x}") from None


def main(argv: Sequence[str] | None = None) -> int:
    config = cli.parse(
        GenerateConfig,
        argv,
        prog="python -m fastgpt.generate",
        description="Generate text from a trained run.",
    )
    prompt = read_prompt(config.prompt)
    generator = load(
        config.out_dir,
        checkpoint_name=config.checkpoint,
        device=config.device,
        dtype=config.dtype,
        kernels=config.kernels,
    )
    for sample in range(config.num_samples):
        if config.num_samples > 1:
            print(f"--- sample {sample + 1} of {config.num_samples}")
        params = dataclasses.replace(config.sampling(), seed=config.seed + sample)
        _print_sample(Generation(generator, prompt, params, config.cache), prompt)
    return 0


def _print_sample(generation: Generation, prompt: str) -> None:
    """Stream one continuation to stdout, and its speed to stderr."""
    block = generation.model.config.block_size
    if len(generation.prompt) + generation.params.max_new_tokens - 1 > block:
        print(f"[past {block} tokens the window slides, and each token costs a prefill of {block}]", file=sys.stderr)
    print(prompt, end="", flush=True)
    for piece in generation:
        print(piece, end="", flush=True)
    print(flush=True)
    synchronize(generation.model.wte.weight.device)
    print(f"[{speed_line(generation)}]", file=sys.stderr)


def speed_line(generation: Generation) -> str:
    """Tokens and tokens/s of prefill and decode, apart."""
    prefill, decode = generation.prefill_tokens, generation.decode_tokens
    parts = [f"prefill {prefill:,} tokens"]
    if generation.prefill_seconds:
        parts[0] += f" at {prefill / generation.prefill_seconds:,.0f} tokens/s"
    if decode:
        parts.append(f"decode {decode:,} tokens at {decode / generation.decode_seconds:,.0f} tokens/s")
    return ", ".join(parts)


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
