"""Writes what a `GenerateConfig` asks for: continuations on the terminal, or a file of answers."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fastgpt.config.escapes import holds_escape
from fastgpt.config.generation import GenerateConfig
from fastgpt.errors import RunFailed, UsageError, shown
from fastgpt.generation.compiled_decoder import CannotCompile
from fastgpt.generation.generator import SINGLE_CACHES, TextGenerator, single_cache
from fastgpt.generation.load import load
from fastgpt.generation.single import Generation
from fastgpt.generation.terminal import print_heading, print_sample, print_samples
from fastgpt.system import contention, threads
from fastgpt.system.device import parse_memory, resolve_device
from fastgpt.system.files import decode_utf8
from fastgpt.system.units import counted
from fastgpt.tokenizer.base import check_unicode

if TYPE_CHECKING:
    from fastgpt.generation.engine import Engine

WORTH_COMPILING = 300  # tokens of one text at a time


def read_prompt(text: str) -> str:
    """The prompt that `prompt` names: the text itself, FILE:path, or - for stdin, with \\n for each \\r\\n."""
    if text == "-":
        return decode_utf8(sys.stdin.buffer.read(), "`prompt`: stdin").replace("\r\n", "\n")
    if not text.startswith("FILE:"):
        return check_unicode(text, "`prompt`")
    path = Path(text.removeprefix("FILE:"))
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise UsageError(f"`prompt` {shown(text)} cannot be read: {getattr(error, 'strerror', error)}") from None
    return decode_utf8(content, f"`prompt`: {path}").replace("\r\n", "\n")


def choose_cache(config: GenerateConfig) -> str:
    """The cache that `cache` names; auto is paged for what needs it or has many continuations, else `single_cache`'s.

    Raises:
        UsageError: flags that do not go together.
    """
    needing = {
        "`interactive`": config.interactive,
        "`speculate`": config.speculate != "none",
        "`kv_memory`": config.kv_memory is not None,
    }
    needs = [flag for flag, given in needing.items() if given]
    if config.interactive and config.prompts is not None:
        raise UsageError("`interactive` and `prompts` exclude each other; pass only one")
    if config.interactive and config.num_samples > 1:
        raise UsageError(f"`num_samples` {config.num_samples}: `interactive` has one continuation a turn; leave it out")
    if config.output is not None and config.prompts is None:
        raise UsageError(f"`output` {config.output} is for `prompts`; send the text of `prompt` there with >")
    if config.resume and config.output is None:
        raise UsageError("`resume` goes on with the file of `output`; name it")
    if config.order != "input" and config.prompts is None:
        raise UsageError(f"`order` {config.order} is for `prompts`; leave it out")
    if config.prompts is not None and config.prompt:
        raise UsageError("`prompt` and `prompts` exclude each other; pass only one")
    if config.cache in SINGLE_CACHES and needs:
        raise UsageError(f"{needs[0]} needs the paged cache, not `cache` {config.cache}; use `cache` paged or auto")
    if config.compile and config.cache == "none":
        raise UsageError("`compile` is for decoding with a cache, not for `cache` none; leave one of them out")
    if config.compile and config.cache == "dense" and resolve_device(config.device).type != "cpu":
        raise UsageError("`compile` needs the paged cache on this device, not `cache` dense; use `cache` paged or auto")
    if config.cache != "auto":
        return config.cache
    device = resolve_device(config.device)
    many = needs or config.prompts is not None or config.num_samples > 1
    return "paged" if many or (config.compile and device.type != "cpu") else single_cache(device)


def write(config: GenerateConfig) -> int:
    """Write it; the exit code.

    Raises:
        UsageError: settings that do not go together, or a run or prompts that cannot be read.
        RunFailed: the model's logits are not numbers.
    """
    with threads.restored(), contention.watching(threads.use(config.threads)):
        return _write(config)


def _write(config: GenerateConfig) -> int:
    cache = choose_cache(config)
    params = config.sampling()
    if not config.stop_escapes and (stop := next(filter(holds_escape, params.stop), None)):
        print(
            f"[`stop` {stop} begins no escape: the backslash stands for itself; for the character that it means add "
            "`stop_escapes=True`, or in bash write $'...']",
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
        from fastgpt.generation import interactive

        return interactive.run(_engine(generator, config), generator.tokenizer, params, prompt)
    prompt = prompt or generator.tokenizer.opening
    if cache == "paged":
        print_samples(_engine(generator, config), prompt, params)
        return 0
    errors = []
    for sample in range(config.num_samples):
        print_heading(sample, config.num_samples)
        parts = generator.model, generator.tokenizer
        made = Generation(*parts, prompt, params, cache, generator.decoder, sample=sample)
        print_sample(made, prompt)
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
    """Compile the decode step if `compile` says so, or says nothing and one text at a time is to become long.

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
    assert generator.decoder is not None
    if generator.decoder.seconds:
        print(f"[compiled in {generator.decoder.seconds:.0f} s, and kept for the next time]", file=sys.stderr)


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
    """Continue the prompts of `prompts`; 1 where one of them could not be, 128 + its number after a signal."""
    from fastgpt.generation import answers, prompts_file, terminal

    answers.check_output(config.output, config.resume)
    jobs = prompts_file.read_prompts(config.prompts or "", config.sampling())
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
            prompts_file.all_at_once(engine, jobs, wanted=written.wanted)
            if engine
            else prompts_file.one_by_one(*parts, jobs, cache, generator.decoder, wanted=written.wanted)
        )
        stopped_by = prompts_file.run(completions, written, engine)
    if engine:
        print(terminal.summary(engine), file=sys.stderr)
    if failed := len(written.failed):
        print(
            f"{failed:,} of {counted(len(jobs), 'prompt')} could not be continued; see their error",
            file=sys.stderr,
        )
    if stopped_by is not None:
        more = "; `resume=True` goes on" if config.output else ""
        print(f"stopped with {written.done:,} of {counted(written.total, 'answer')} written{more}", file=sys.stderr)
        return 128 + stopped_by
    return 1 if failed else 0
