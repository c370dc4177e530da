"""Shows the attention maps of a model over a text: a page, a picture, the numbers, and a table of labelled heads."""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from fastgpt.checkpoint import progress, run_folder, store
from fastgpt.checkpoint.source import Source, open_model
from fastgpt.config.inspection import AttentionConfig
from fastgpt.config.model import ModelConfig
from fastgpt.config.sources import STEP_NAME, could_be_hub_name
from fastgpt.errors import RunFailed, UsageError
from fastgpt.generation.generator import TextGenerator
from fastgpt.generation.prompts_file import read_prompt
from fastgpt.inspection import attention_numbers, attention_picture, outputs, page_data, selection
from fastgpt.inspection.attention import token_ids
from fastgpt.inspection.heads import LABELLED, LABELS
from fastgpt.inspection.page_data import Content
from fastgpt.inspection.snapshot import Layer, Origin, Snapshot, take
from fastgpt.model import memory
from fastgpt.model.facts import count_parameters, describe_shape
from fastgpt.model.gpt import GPT
from fastgpt.ops import table
from fastgpt.system import contention, threads
from fastgpt.system.device import resolve_device
from fastgpt.system.units import counted

MOST_ROWS = 6  # of the table, for each label


def show(config: AttentionConfig) -> int:
    """Write what the configuration asks for; the exit code.

    Raises:
        UsageError: a model, a text, a layer, a head or an output that is not there, or cannot be read or written.
        RunFailed: the model's logits are not numbers.
    """
    with threads.restored(), contention.watching(threads.use(config.threads)):
        paths = {setting: outputs.check(setting, path) for setting, path in config.outputs.items()}
        content = _content(config)
        _write(content, paths)
        _print_heads(content.snapshots[-1].layers)
        _print_loss(content)
        return 0


def _content(config: AttentionConfig) -> Content:
    text = read_prompt(config.text or "", "text")
    if not text:
        raise UsageError("`text` is empty; give the model a token or more to read")
    snapshots: list[Snapshot] = []
    for name in _checkpoints(config):
        source, generator = _open(config, name)
        if not snapshots:
            tokens = token_ids(generator.tokenizer, generator.model, text)
            layers = _layers(config, generator.model.config)
        snapshots.append(
            take(generator, tokens, layers, _origin(source, config.src), keep_maps=config.json is not None)
        )
        if not snapshots[-1].lens.probabilities.isfinite().all():
            raise RunFailed(f"{source.file}: its logits are not numbers; use another checkpoint")
    named = _named(_short_name(config.src, source), [one.origin for one in snapshots])
    return Content(
        title=f"Attention in {named}",
        source=named,
        model=_described(generator.model.config),
        tokenizer=generator.tokenizer,
        config=generator.model.config,
        tokens=tokens,
        snapshots=snapshots,
        picked=_picked(config, snapshots[-1].layers),
    )


def _short_name(src: str, source: Source) -> str:
    """A model's name on the hub, or that of its file or folder: a page that is passed on names no other folder."""
    return src if could_be_hub_name(src) else source.path.absolute().name


def _named(src: str, origins: Sequence[Origin]) -> str:
    """The model, with the step of a run's checkpoint, or the steps of the first and the last."""
    first, last = origins[0], origins[-1]
    if first.step is None:
        return src
    return f"{src}, {first.name}" if first == last else f"{src}, steps {first.step} to {last.step}"


def _checkpoints(config: AttentionConfig) -> list[str]:
    """The names of the checkpoints to read, the earliest first."""
    if config.checkpoints is None:
        return [config.checkpoint]
    selection.check_count(config.checkpoints)
    path = Path(config.src)
    opened = open_model(_source(config), download=config.download, setting="src")  # there is a model, at least
    if opened.step is None or STEP_NAME.fullmatch(path.name):
        raise UsageError(f"`checkpoints` is for the folder of a run, and {path} is none; leave it out")
    folders, known = selection.checkpoints(config.checkpoints, path)
    if config.checkpoints == "all" and len(folders) < known:
        _note(f"{len(folders)} of {known} checkpoints are shown, evenly spaced")
    return [folder.name for folder in folders]


def _source(config: AttentionConfig) -> str | Path:
    return Path(config.src) if config.src == AttentionConfig.src else config.src  # the default run is no hub's name


def _open(config: AttentionConfig, checkpoint: str) -> tuple[Source, TextGenerator]:
    """A model in float32, whatever it was saved in."""
    device = resolve_device(config.device)
    source = open_model(_source(config), checkpoint=checkpoint, download=config.download, setting="src")
    tokenizer, shape = source.required_tokenizer(), source.config
    memory.check_position_table(shape, device)
    with store.naming(source.file):
        ops = table.resolve("reference", device)
        model = GPT.from_weights(shape, ops, source.weights(shape), device, torch.float32)
    return source, TextGenerator(model, tokenizer, run_folder.packed(source.about))


def _origin(source: Source, name: str) -> Origin:
    if source.step is None:
        return Origin(_short_name(name, source))
    found = progress.read(store.load_state(source.step), source.step / store.STATE)
    return Origin(f"step {found.step}", found.step, found.val_loss if found.evaluated_step == found.step else None)


def _layers(config: AttentionConfig, shape: ModelConfig) -> list[int]:
    """The layers to show. Raises `UsageError` for a layer or a head that is not there, or not shown."""
    layers = selection.layers(config.layers, shape.n_layer)
    if config.head is not None:
        selection.check_head(config.head, shape.n_head)
    if config.layer is not None:
        selection.check_layer(config.layer, shape.n_layer, "layer")
        if config.layer not in layers:
            raise UsageError(f"`layer` {config.layer} is not among `layers` {config.layers}; add it there")
    return layers


def _picked(config: AttentionConfig, layers: dict[int, Layer]) -> tuple[int, int]:
    """The layer and head to enlarge, as far as they were given; else an induction head, or the clearest pattern."""

    def clearness(place: tuple[int, int]) -> tuple[bool, float]:
        head = layers[place[0]].heads[place[1]]
        inducing = LABELS["induction"] in dict(head.labels)
        return inducing, max(head.scores["induction"] or 0.0, head.scores["previous"] or 0.0)

    places = [
        (number, head)
        for number, layer in layers.items()
        for head in range(len(layer.heads))
        if config.layer in (None, number) and config.head in (None, head)
    ]
    return max(places, key=clearness)


def _described(config: ModelConfig) -> str:
    """A model in a line."""
    vocabulary = f"vocabulary {config.known_vocab:,}"
    return f"{describe_shape(config)}, {vocabulary}, {count_parameters(config) / 1e6:.3g}M parameters"


def _write(content: Content, paths: dict[str, Path]) -> None:
    if path := paths.get("output"):
        page, notes = page_data.fitted(content)
        outputs.save("output", path, [page.encode()])
        for note in notes[1:]:  # the first is true of every page
            _note(f"{note}; `layers` chooses layers, and `json` and `png` have all")
    if path := paths.get("png"):
        layers = content.snapshots[-1].layers
        outputs.save("png", path, [attention_picture.draw(layers, len(content.tokens), content.title)])
    if path := paths.get("json"):
        outputs.save("json", path, (part.encode() for part in attention_numbers.parts(content)))


def _print_heads(layers: dict[int, Layer]) -> None:
    """Print the heads that follow a pattern, the clearest first."""
    found: dict[str, list[tuple[float, int, int]]] = {label: [] for label in LABELS.values()}
    for number, layer in layers.items():
        for at, head in enumerate(layer.heads):
            for label, score in head.labels:
                found[label].append((score, number, at))
    if not any(found.values()):
        print(f"no head gives {LABELLED:.0%} of its weight to one of: {', '.join(LABELS.values())}")
        return
    shown = Table(box=box.SIMPLE, pad_edge=False)
    shown.add_column("pattern", no_wrap=True)
    for column in ("layer", "head", "score", "entropy", "distance"):
        shown.add_column(column, justify="right", no_wrap=True)
    for label, places in found.items():
        for score, number, at in sorted(places, reverse=True)[:MOST_ROWS]:
            head = layers[number].heads[at]
            numbers = f"{score:.2f}", f"{head.entropy:.2f}", f"{head.distance:.1f}"
            shown.add_row(label, str(number), str(at), *numbers)
        if len(places) > MOST_ROWS:
            shown.add_row(f"and {len(places) - MOST_ROWS} more")
    Console(highlight=False, markup=False, emoji=False).print(shown)


def _print_loss(content: Content) -> None:
    losses, T = content.snapshots[-1].outcome.losses, len(content.tokens)
    mean = f"mean loss {losses.mean():.4f} nats" if T > 1 else "no loss, as no token is predicted"
    print(f"{counted(T, 'token')}, {mean}")


def _note(text: str) -> None:
    print(f"[{text}]", file=sys.stderr, flush=True)
