"""Writes what a `GenerateConfig` asks for: continuations on the terminal, or a file of answers."""

from typing import TYPE_CHECKING

from fastgpt.config.escapes import holds_escape
from fastgpt.config.generation import GenerateConfig
from fastgpt.generation import prompts_file, setting_rules, terminal
from fastgpt.generation.compiled_decoder import CannotCompile
from fastgpt.generation.generator import TextGenerator
from fastgpt.generation.load import load
from fastgpt.generation.single import Generation
from fastgpt.system import contention, threads
from fastgpt.system.device import parse_memory, resolve_device

if TYPE_CHECKING:
    from fastgpt.generation.engine import Engine

WORTH_COMPILING = 300  # tokens, in texts that are generated one at a time


def write(config: GenerateConfig) -> int:
    """Write the continuations that the configuration asks for; the exit code.

    Raises:
        UsageError: settings that do not go together, or a run or prompts that cannot be read.
        RunFailed: the model's logits are not numbers.
    """
    with threads.restored(), contention.watching(threads.use(config.threads)):
        return _write(config)


def _write(config: GenerateConfig) -> int:
    setting_rules.check(config)
    cache = setting_rules.choose_cache(config)
    params = config.sampling()
    if not config.stop_escapes and (stop := next(filter(holds_escape, params.stop), None)):
        terminal.note(
            f"`stop` {stop} begins no escape: the backslash stands for itself; for the character that it means add "
            "`stop_escapes=True`, or in bash write $'...'"
        )
    if config.kv_memory is not None:
        parse_memory(config.kv_memory, resolve_device(config.device))  # before anything is loaded
    if config.prompts is not None:
        return _answer_file(config, cache)
    prompt = prompts_file.read_prompt(config.prompt)
    generator = _load(config)
    _compile(generator, config, alone=config.interactive)
    if config.interactive:
        from fastgpt.generation import interactive

        return interactive.run(_engine(generator, config), generator.tokenizer, params, prompt)
    prompt = prompt or generator.tokenizer.opening
    if cache == "paged":
        terminal.print_samples(_engine(generator, config), prompt, params)
        return 0
    parts = generator.model, generator.tokenizer
    generations = (
        Generation(*parts, prompt, params, cache, generator.decoder, sample=sample)
        for sample in range(params.num_samples)
    )
    terminal.print_one_by_one(generations, prompt, params)
    return 0


def _load(config: GenerateConfig) -> TextGenerator:
    generator = load(
        config.source,
        download=config.download,
        setting="out_dir" if config.model is None else "model",
        checkpoint_name=config.checkpoint,
        device=config.device,
        dtype=config.dtype,
        kernels=config.kernels,
        quantize=config.quantize,
        batch=config.max_batch if config.prompts is not None else min(config.num_samples, config.max_batch),
        compile=bool(config.compile),
    )
    if generator.model.device.type == "cuda":  # elsewhere there is no choice of backends
        terminal.note(f"kernels {generator.model.ops}")
    return generator


def _compile(generator: TextGenerator, config: GenerateConfig, alone: bool) -> None:
    """On a CPU, compile the decoder with `compile` set, or with `compile` unset where `alone` says that it pays.

    The time that it takes is printed apart from that of tokens. On other devices the engine compiles.
    """
    if config.compile is False or generator.model.device.type != "cpu" or not (config.compile or alone):
        return
    try:
        generator.compile(terminal.note)
    except CannotCompile as error:
        if config.compile:
            raise
        terminal.note(f"not compiled: {error}")
        return
    assert generator.decoder is not None
    if generator.decoder.seconds:
        terminal.note(f"compiled in {generator.decoder.seconds:.0f} s, and kept for the next time")


def _engine(generator: TextGenerator, config: GenerateConfig) -> "Engine":
    """An engine with the configuration's settings. Its window slides, as with the other caches."""
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
    """Continue the prompts of a file; the exit code: 1 if one could not be continued, 128 + number after a signal."""
    from fastgpt.generation import answers, many_prompts

    answers.check_output(config.output, config.resume)
    jobs = prompts_file.read_prompts(config.prompts or "", config.sampling())
    with answers.Answers(config.output, jobs, resume=config.resume, order=config.order) as written:
        if written.done == written.total:
            terminal.note(f"all {written.total:,} answers are there already")
            return 1 if written.failed else 0
        generator = _load(config)
        single = cache == "dense" or config.max_batch == 1 or written.total - written.done == 1
        tokens = sum(len(left) * params.max_new_tokens for left, (_, params) in zip(written.wanted, jobs, strict=True))
        _compile(generator, config, alone=single and cache != "none" and tokens >= WORTH_COMPILING)
        engine = _engine(generator, config) if cache == "paged" else None
        parts = generator.model, generator.tokenizer
        completions = (
            many_prompts.all_at_once(engine, jobs, wanted=written.wanted)
            if engine
            else many_prompts.one_by_one(*parts, jobs, cache, generator.decoder, wanted=written.wanted)
        )
        stopped_by = many_prompts.answer(completions, written, engine)
    if engine:
        terminal.print_summary(engine)
    terminal.print_outcome(written, len(jobs), stopped=stopped_by is not None)
    if stopped_by is not None:
        return 128 + stopped_by
    return 1 if written.failed else 0
