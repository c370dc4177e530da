"""The rules which settings of a `GenerateConfig` go together, and the cache that follows from them."""

from collections.abc import Callable

from fastgpt.config.generation import GenerateConfig
from fastgpt.errors import UsageError
from fastgpt.generation.generator import SINGLE_CACHES, single_cache
from fastgpt.system.device import resolve_device

NEEDS_PAGES: dict[str, Callable[[GenerateConfig], bool]] = {
    "interactive": lambda c: c.interactive,
    "speculate": lambda c: c.speculate != "none",
    "kv_memory": lambda c: c.kv_memory is not None,
}
# What is wrong, in the order in which it is looked for, and the message; `c` is the configuration.
RULES: tuple[tuple[Callable[[GenerateConfig], bool], str], ...] = (
    (
        lambda c: c.download and c.model is None,
        "`download` fetches the model that `model` names; name one, such as gpt2",
    ),
    (
        lambda c: c.interactive and c.prompts is not None,
        "`interactive` and `prompts` exclude each other; pass only one",
    ),
    (
        lambda c: c.interactive and c.num_samples > 1,
        "`num_samples` {c.num_samples}: `interactive` has one continuation a turn; leave it out",
    ),
    (
        lambda c: c.interactive and c.candidates,
        "`interactive` and `candidates` exclude each other; continue one text, by `prompt`, to see its candidates",
    ),
    (
        lambda c: c.output is not None and c.prompts is None,
        "`output` {c.output} is for `prompts`; send the text of `prompt` there with >",
    ),
    (
        lambda c: c.resume and c.output is None,
        "`resume` goes on with the file of `output`; name it",
    ),
    (
        lambda c: c.order != "input" and c.prompts is None,
        "`order` {c.order} is for `prompts`; leave it out",
    ),
    (
        lambda c: c.prompts is not None and c.prompt != "",
        "`prompt` and `prompts` exclude each other; pass only one",
    ),
    *(
        (
            lambda c, needs=needs: c.cache in SINGLE_CACHES and needs(c),
            f"`{name}` needs the paged cache, not `cache` {{c.cache}}; use `cache` paged or auto",
        )
        for name, needs in NEEDS_PAGES.items()
    ),
    (
        lambda c: bool(c.compile) and c.cache == "none",
        "`compile` is for decoding with a cache, not for `cache` none; leave one of them out",
    ),
    (
        lambda c: bool(c.compile) and c.cache == "dense" and resolve_device(c.device).type != "cpu",
        "`compile` needs the paged cache on this device, not `cache` dense; use `cache` paged or auto",
    ),
)


def check(config: GenerateConfig) -> None:
    """Raise `UsageError` for the first rule that the settings break."""
    for broken, message in RULES:
        if broken(config):
            raise UsageError(message.format(c=config))


def choose_cache(config: GenerateConfig) -> str:
    """The cache to use: "none", "dense" or "paged".

    With `cache` auto that is "paged" for settings that need it, for many continuations, and for compiling on another
    device than a CPU; otherwise it is `single_cache`'s.
    """
    if config.cache != "auto":
        return config.cache
    device = resolve_device(config.device)
    many = config.prompts is not None or config.num_samples > 1
    compiled = bool(config.compile) and device.type != "cpu"
    if many or compiled or any(needs(config) for needs in NEEDS_PAGES.values()):
        return "paged"
    return single_cache(device)
