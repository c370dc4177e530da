"""Generate text from a trained run: one continuation at a time, or many at once.

    python -m fastgpt.generate --prompt "The with statement"
    python -m fastgpt.generate --prompts prompts.txt --output answers.jsonl

Python: `fastgpt.load("out").generate("The with statement")`, or `.engine()` for many prompts.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

if __name__ == "__main__":
    from fastgpt import barriers

    barriers.choose(sys.argv)  # before PyTorch is imported

import torch

from fastgpt import checkpoint, cli, contention, dispatch, memory_need, run_folder, threads, tokenizer
from fastgpt.config import CACHES, QUANTIZATION, GenerateConfig, ModelConfig, SamplingParams, validate_fields
from fastgpt.decode_step import CannotCompile, DecodeStep
from fastgpt.device import parse_memory, resolve_device, resolve_weights_dtype, synchronize
from fastgpt.errors import CorruptCheckpoint, RunFailed, UsageError, shown
from fastgpt.escapes import holds_escape
from fastgpt.files import decode_utf8
from fastgpt.model import GPT
from fastgpt.paged_text import PagedText
from fastgpt.prompt import Prompt, prompt_tokens
from fastgpt.quantized import quantize_model
from fastgpt.settings import EngineOptions, SamplingSettings, check_names, sampling
from fastgpt.single import Generation
from fastgpt.tokenizer import Tokenizer, check_unicode
from fastgpt.units import counted
from fastgpt.workload import Workload

if TYPE_CHECKING:
    from fastgpt.engine import Engine

SINGLE_CACHES = ("none", "dense")
WORTH_COMPILING = 300  # tokens of one text at a time
TIMED_TOKENS = 1 << 16  # in all contexts together: kernels are timed for no more, which would take too much memory


class TextGenerator:
    """A model and its tokenizer: text in, text out."""

    def __init__(self, model: GPT, tokenizer: Tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.step: DecodeStep | None = None
        self._idle: list[PagedText] = []  # of streams that have ended

    def compile(self, announce: Callable[[str], None] | None = None) -> None:
        """Decode with a compiled step from now on, `step`; where a run before compiled it, that is loaded.

        For single continuations on a CPU: by the dense cache, and by engines while they have only one.

        Args:
            announce: called with a sentence before compiling begins.

        Raises:
            CannotCompile: the model is not on a CPU, or there is no compiler.
        """
        self.step = self.step or DecodeStep(self.model, announce)

    def generate(self, prompt: Prompt = "", *, cache: str = "auto", **settings: Unpack[SamplingSettings]) -> str:
        """The continuation of the prompt, without the prompt itself. See `stream`.

        Raises:
            RunFailed: the model's logits are not numbers.
        """
        made = self.stream(prompt, cache=cache, **settings)
        text = "".join(made)
        if made.error is not None:
            raise RunFailed(made.error)
        return text

    def stream(self, prompt: Prompt = "", *, cache: str = "auto", **settings: Unpack[SamplingSettings]) -> Generation:
        """The continuation piece by piece, as it comes: an iterator of texts.

        Args:
            prompt: any text, or token ids; an empty one starts at the tokenizer's start token.
            cache: "dense" keeps keys and values in a buffer, "paged" in pages, "none" computes them anew for every
                token; "auto" is paged on CUDA, where a token is then a replayed graph, and dense elsewhere.
            settings: fields of `SamplingParams`.

        Raises:
            UsageError: an unknown setting or one outside its limits, more than one sample, or a character that the
                tokenizer does not know.
        """
        params = sampling(settings)
        if cache not in CACHES:
            raise UsageError(f"cache {cache!r} is not one of {', '.join(CACHES)}")
        if cache == "auto":
            cache = single_cache(self.model.device)
        if params.num_samples > 1:
            raise UsageError(f"num_samples {params.num_samples}: a stream is one continuation; use engine()")
        return Generation(self.model, self.tokenizer, prompt, params, cache, self.step, idle=self._idle)

    def engine(self, **options: Unpack[EngineOptions]) -> "Engine":
        """An engine for many prompts at once; see `fastgpt.engine.Engine` for its options.

        Raises:
            UsageError: an unknown option, or one outside its limits.
        """
        from fastgpt.engine import Engine

        check_names(options, EngineOptions.__annotations__)
        return Engine(self.model, self.tokenizer, **{"step": self.step, **options})


def load(
    out_dir: str | Path = "out",
    *,
    checkpoint_name: str = "best",
    device: str = "auto",
    dtype: str = "auto",
    kernels: str = "auto",
    quantize: str = "none",
    batch: int = 1,
    compile: bool = False,
    threads: int | None = None,
) -> TextGenerator:
    """The generator of a trained run, from its best checkpoint unless told otherwise.

    Args:
        quantize: "int8" keeps matrices in 8 bits; see `fastgpt.quantized`.
        batch, compile: continuations that will run side by side, and whether the engine will compile; `kernels` "auto"
            takes what is fastest on a GPU then.
        threads: on a CPU, with which PyTorch computes from now on in the whole process; None leaves that as it is.

    Raises:
        UsageError: no run there, a corrupt checkpoint, an unknown device, or no such number of threads.
    """
    if threads is not None:
        validate_fields(GenerateConfig, {"threads": threads})
        torch.set_num_threads(threads)
    if quantize not in QUANTIZATION:
        raise UsageError(f"--quantize {quantize!r} is not one of {', '.join(QUANTIZATION)}")
    out_dir, where = Path(out_dir), resolve_device(device)
    step_dir = checkpoint.find(out_dir, checkpoint_name)
    config, about = run_folder.load(out_dir)
    # What auto found fastest for training need not be so for generation, so only columns that were asked for are kept.
    kept = about.get("columns") if config.kernels != "auto" and about.get("device") == where.type else None
    resolve = functools.partial(dispatch.resolve, kernels, where, recorded=kept)
    weights_dtype = resolve_weights_dtype(dtype, where, interpreted=resolve().interpreted)
    vocabulary = tokenizer.load(out_dir / "tokenizer.json")
    checkpoint.verify(step_dir, (checkpoint.MODEL, checkpoint.STATE))
    checkpoint.check_vocabulary(step_dir, vocabulary)
    config = dataclasses.replace(config, vocab_size=vocabulary.vocab_size)
    weights = checkpoint.load_weights(step_dir)
    _check_size(out_dir, step_dir, config, weights)
    memory_need.check_position_table(config, where)
    B = max(1, min(batch, TIMED_TOKENS // config.block_size))
    planned = Workload.of_generation(config, weights_dtype, B, int8=quantize == "int8", compile=compile)
    ops = resolve(workload=planned)
    with checkpoint.naming(step_dir / checkpoint.MODEL):
        model = GPT.from_weights(config, ops, weights, where, weights_dtype)
    if quantize == "int8":
        quantize_model(model)
    return TextGenerator(model, vocabulary)


def _check_size(out_dir: Path, step_dir: Path, config: ModelConfig, weights: Mapping[str, torch.Tensor]) -> None:
    """Raise `CorruptCheckpoint` for a configuration of another size than the weights, before a model is built of it."""
    described, held = config.num_parameters, sum(tensor.numel() for tensor in weights.values())
    if described != held:
        raise CorruptCheckpoint(
            f"{out_dir / 'config.json'} describes {counted(described, 'parameter')}, and "
            f"{step_dir / checkpoint.MODEL} holds {held:,}; put the run's own config.json back"
        )


def read_prompt(text: str) -> str:
    """The prompt that --prompt names: the text itself, FILE:path, or - for stdin, with \\n for each \\r\\n."""
    if text == "-":
        return decode_utf8(sys.stdin.buffer.read(), "--prompt: stdin").replace("\r\n", "\n")
    if not text.startswith("FILE:"):
        return check_unicode(text, "--prompt")
    path = Path(text.removeprefix("FILE:"))
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise UsageError(f"--prompt {shown(text)} cannot be read: {getattr(error, 'strerror', error)}") from None
    return decode_utf8(content, f"--prompt: {path}").replace("\r\n", "\n")


def single_cache(device: torch.device) -> str:
    """The fastest cache for one continuation: paged with CUDA graphs, where there are any."""
    return "paged" if device.type == "cuda" else "dense"


def choose_cache(config: GenerateConfig) -> str:
    """The cache that --cache names; auto is paged for what needs it or has many continuations, else `single_cache`'s.

    Raises:
        UsageError: flags that do not go together.
    """
    needing = {
        "--interactive": config.interactive,
        "--speculate": config.speculate != "none",
        "--kv_memory": config.kv_memory is not None,
    }
    needs = [flag for flag, given in needing.items() if given]
    if config.interactive and config.prompts is not None:
        raise UsageError("--interactive and --prompts exclude each other; pass only one")
    if config.interactive and config.num_samples > 1:
        raise UsageError(f"--num_samples {config.num_samples}: --interactive has one continuation a turn; leave it out")
    if config.output is not None and config.prompts is None:
        raise UsageError(f"--output {config.output} is for --prompts; send the text of --prompt there with >")
    if config.resume and config.output is None:
        raise UsageError("--resume goes on with the file of --output; name it")
    if config.order != "input" and config.prompts is None:
        raise UsageError(f"--order {config.order} is for --prompts; leave it out")
    if config.prompts is not None and config.prompt:
        raise UsageError("--prompt and --prompts exclude each other; pass only one")
    if config.cache in SINGLE_CACHES and needs:
        raise UsageError(f"{needs[0]} needs the paged cache, not --cache {config.cache}; use --cache paged or auto")
    if config.compile and config.cache == "none":
        raise UsageError("--compile is for decoding with a cache, not for --cache none; leave one of them out")
    if config.compile and config.cache == "dense" and resolve_device(config.device).type != "cpu":
        raise UsageError("--compile needs the paged cache on this device, not --cache dense; use --cache paged or auto")
    if config.cache != "auto":
        return config.cache
    device = resolve_device(config.device)
    many = needs or config.prompts is not None or config.num_samples > 1
    return "paged" if many or (config.compile and device.type != "cpu") else single_cache(device)


def main(argv: Sequence[str] | None = None) -> int:
    config = cli.parse(
        GenerateConfig,
        argv,
        prog="python -m fastgpt.generate",
        description="Generate text from a trained run.",
    )
    with threads.restored(), contention.watching(threads.use(config.threads)):
        return _generate(config)


def _generate(config: GenerateConfig) -> int:
    """Write what the flags ask for; the exit code."""
    cache = choose_cache(config)
    params = config.sampling()
    if not config.stop_escapes and (stop := next(filter(holds_escape, params.stop), None)):
        print(
            f"[--stop {stop} begins no escape: the backslash stands for itself; for the character that it means add "
            "--stop_escapes, or in bash write $'...']",
            file=sys.stderr,
        )
    if config.kv_memory is not None:
        parse_memory(config.kv_memory, resolve_device(config.device))  # before anything is loaded
    if config.prompts is not None:
        return _answer_file(config, cache)
    prompt = read_prompt(config.prompt)
    generator = _load(config)
    _compile(generator, config, alone=config.interactive)
    if config.interactive:
        from fastgpt import interactive

        return interactive.run(_engine(generator, config), generator.tokenizer, params, prompt)
    prompt = prompt or generator.tokenizer.opening
    if cache == "paged":
        _print_samples(_engine(generator, config), prompt, params)
        return 0
    errors = []
    for sample in range(config.num_samples):
        _print_heading(sample, config.num_samples)
        parts = generator.model, generator.tokenizer
        made = Generation(*parts, prompt, params, cache, generator.step, sample=sample)
        _print_sample(made, prompt)
        errors += [made.error] if made.error is not None else []
    if errors:
        raise RunFailed(errors[0])
    return 0


def _load(config: GenerateConfig) -> TextGenerator:
    generator = load(
        config.out_dir,
        checkpoint_name=config.checkpoint,
        device=config.device,
        dtype=config.dtype,
        kernels=config.kernels,
        quantize=config.quantize,
        batch=config.max_batch if config.prompts is not None else min(config.num_samples, config.max_batch),
        compile=bool(config.compile),
    )
    if generator.model.device.type == "cuda":  # elsewhere there is no choice to tell of
        print(f"[kernels {generator.model.ops}]", file=sys.stderr)
    return generator


def _compile(generator: TextGenerator, config: GenerateConfig, alone: bool) -> None:
    """Compile the decode step if --compile says so, or says nothing and one text at a time is to become long.

    Time to compile is told apart from that of tokens. On other devices than a CPU the engine compiles.
    """
    if config.compile is False or generator.model.device.type != "cpu" or not (config.compile or alone):
        return
    try:
        generator.compile(lambda sentence: print(f"[{sentence}]", file=sys.stderr, flush=True))
    except CannotCompile as error:
        if config.compile:
            raise
        print(f"[not compiled: {error}]", file=sys.stderr)
        return
    assert generator.step is not None
    if generator.step.seconds:
        print(f"[compiled in {generator.step.seconds:.0f} s, and kept for the next time]", file=sys.stderr)


def _engine(generator: TextGenerator, config: GenerateConfig) -> "Engine":
    """An engine with the command line's settings, whose window slides as with the other caches."""
    device = generator.model.device
    return generator.engine(
        max_batch=config.max_batch,
        max_batch_tokens=config.max_batch_tokens,
        page_size=config.page_size,
        kv_memory=None if config.kv_memory is None else parse_memory(config.kv_memory, device),
        prefix_cache=config.prefix_cache,
        speculate=config.speculate,
        slide=True,
        compile=bool(config.compile) and device.type != "cpu",
    )


def _answer_file(config: GenerateConfig, cache: str) -> int:
    """Continue the prompts of --prompts; 1 where one of them could not be, 128 + its number after a signal."""
    from fastgpt import answers, batch

    answers.check_output(config.output, config.resume)
    jobs = batch.read_prompts(config.prompts or "", config.sampling())
    with answers.Answers(config.output, jobs, resume=config.resume, order=config.order) as written:
        if written.done == written.total:
            print(f"[all {written.total:,} answers are there already]", file=sys.stderr)
            return 1 if written.failed else 0
        generator = _load(config)
        single = cache == "dense" or config.max_batch == 1 or written.total - written.done == 1
        tokens = sum(len(left) * params.max_new_tokens for left, (_, params) in zip(written.wanted, jobs, strict=True))
        _compile(generator, config, alone=single and cache != "none" and tokens >= WORTH_COMPILING)
        engine = _engine(generator, config) if cache == "paged" else None
        parts = generator.model, generator.tokenizer
        completions = (
            batch.all_at_once(engine, jobs, wanted=written.wanted)
            if engine
            else batch.one_by_one(*parts, jobs, cache, generator.step, wanted=written.wanted)
        )
        stopped_by = batch.run(completions, written, engine)
    if engine:
        print(batch.summary(engine), file=sys.stderr)
    if failed := len(written.failed):
        print(
            f"{failed:,} of {counted(len(jobs), 'prompt')} could not be continued; see their error",
            file=sys.stderr,
        )
    if stopped_by is not None:
        more = "; --resume goes on" if config.output else ""
        print(f"stopped with {written.done:,} of {counted(written.total, 'answer')} written{more}", file=sys.stderr)
        return 128 + stopped_by
    return 1 if failed else 0


def _print_heading(sample: int, samples: int) -> None:
    if samples > 1:
        print(f"--- sample {sample + 1} of {samples}")


def _warn_of_sliding(prompt_tokens: int, params: SamplingParams, block: int) -> None:
    if prompt_tokens + params.max_new_tokens - 1 > block:
        print(
            f"[past {counted(block, 'token')} the window slides, and each token costs a prefill of {block}]",
            file=sys.stderr,
        )


def _print_samples(engine: "Engine", prompt: str, params: SamplingParams) -> None:
    """The continuations to stdout, one after the other, the first as it comes; how it went to stderr."""
    from fastgpt import batch

    tokens = prompt_tokens(prompt, engine.tokenizer, engine.vocab_size)
    _warn_of_sliding(len(tokens), params, engine.block_size)
    texts, shown = ["" for _ in range(params.num_samples)], 0
    ended, errors = [False for _ in range(params.num_samples)], {}

    def begin(sample: int) -> None:
        _print_heading(sample, params.num_samples)
        print(prompt, end="", flush=True)

    begin(0)
    for piece in engine.stream([tokens], params):
        if piece.completion and piece.completion.refused:
            print(flush=True)
            raise UsageError(piece.completion.error)
        if piece.completion and piece.completion.error:
            errors[piece.sample] = piece.completion.error
        texts[piece.sample] += piece.text
        ended[piece.sample] = piece.completion is not None
        while shown < params.num_samples:
            print(texts[shown], end="", flush=True)
            texts[shown] = ""
            if not ended[shown]:
                break
            print(flush=True)
            shown += 1
            if shown < params.num_samples:
                begin(shown)
    stats = engine.stats
    line = speed_line(stats.prefill_tokens, stats.prefill_seconds, stats.decode_tokens, stats.decode_seconds)
    guesses = f", {batch.acceptance(stats)}" if engine.speculate != "none" else ""
    print(f"[{line}{guesses}]", file=sys.stderr)
    if errors:
        raise RunFailed(errors[min(errors)])


def _print_sample(generation: Generation, prompt: str) -> None:
    """Stream one continuation to stdout, and its speed to stderr."""
    _warn_of_sliding(len(generation.prompt), generation.params, generation.model.config.block_size)
    print(prompt, end="", flush=True)
    for piece in generation:
        print(piece, end="", flush=True)
    print(flush=True)
    synchronize(generation.model.device)
    line = speed_line(
        generation.prefill_tokens, generation.prefill_seconds, generation.decode_tokens, generation.decode_seconds
    )
    print(f"[{line}]", file=sys.stderr)


def speed_line(prefill: int, prefill_seconds: float, decode: int, decode_seconds: float) -> str:
    """Tokens and tokens/s of prefill and decode, apart."""
    parts = [f"prefill {counted(prefill, 'token')}"]
    if prefill_seconds:
        parts[0] += f" at {prefill / prefill_seconds:,.0f} tokens/s"
    if decode:
        parts.append(f"decode {counted(decode, 'token')} at {decode / decode_seconds:,.0f} tokens/s")
    return ", ".join(parts)


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
