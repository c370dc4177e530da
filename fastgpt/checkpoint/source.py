"""Opens a model, whichever program saved it: its configuration, its tokenizer, its tensors.

A source is a run's folder, the folder of one of its steps, a folder of GPT-2 in transformers' layout, nanoGPT's
ckpt.pt, a GGUF file, or a model's name on Hugging Face's hub. `open_model` tells them apart by what is in them.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastgpt.checkpoint import run_folder, store
from fastgpt.config.model import ModelConfig
from fastgpt.config.sources import STEP_NAME, could_be_hub_name, exists
from fastgpt.errors import CorruptCheckpoint, UsageError, shown
from fastgpt.interchange import gguf_file, hub, huggingface, nanogpt_weights
from fastgpt.interchange.foreign import ForeignModel
from fastgpt.model.facts import count_parameters, parameter_shapes
from fastgpt.model.gpt import VOCABULARY
from fastgpt.system import json_files
from fastgpt.system.lazy_tensors import LazyTensors
from fastgpt.system.units import counted
from fastgpt.tokenizer import saved
from fastgpt.tokenizer.base import Tokenizer

PADDING = 128  # an embedding is filled up to a multiple of this power of two, or of a smaller one
WAYS_OUT = "name a run's or a step's folder, a Hugging Face folder, a .gguf file or a .pt file"
LAYER = re.compile(r"h\.(\d{1,9})\.")


@dataclass(frozen=True)
class Source:
    """A model that was opened. Its weights are read when they are asked for.

    Attributes:
        path: the file or folder that was opened.
        format: "fastgpt", "huggingface", "gguf" or "nanogpt".
        shape: vocab_size is the number of the embedding's rows.
        tensors: by the names of `GPT`.
        read_tokenizer: reads the vocabulary; None where the source has none.
        step: the folder of a run's checkpoint.
        about: the content of a run's config.json.
    """

    path: Path
    format: str
    shape: ModelConfig
    tensors: LazyTensors
    read_tokenizer: Callable[[], Tokenizer | None]
    step: Path | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def file(self) -> Path:
        """The file or folder that holds its weights."""
        return self.step / store.MODEL if self.step else self.path

    @functools.cached_property
    def tokenizer(self) -> Tokenizer | None:
        """Its vocabulary; None where it has none. Raises `UsageError` if that is damaged, or not of these weights."""
        tokenizer, rows = self.read_tokenizer(), self.shape.known_vocab
        if tokenizer is not None and not _fills_up(rows, tokenizer.vocab_size):
            raise UsageError(
                f"{self.path}: its vocabulary has {counted(tokenizer.vocab_size, 'token')}, and its embedding {rows:,} "
                "rows; put the model's own tokenizer there"
            )
        return tokenizer

    @property
    def config(self) -> ModelConfig:
        """The shape with the vocabulary's size."""
        size = self.tokenizer.vocab_size if self.tokenizer else self.shape.vocab_size
        return dataclasses.replace(self.shape, vocab_size=size)

    def required_tokenizer(self) -> Tokenizer:
        """Its vocabulary. Raises `UsageError` where it has none."""
        if self.tokenizer is None:
            raise UsageError(f"{self.path} has no tokenizer; put the model's own beside it")
        return self.tokenizer

    def weights(self, config: ModelConfig) -> LazyTensors:
        """The weights for a model without the vocabulary's padding, or with a shorter context: embeddings' first rows.

        Raises:
            UsageError: the model is of another vocabulary, or lacks positions.
        """
        vocab, block = config.known_vocab, config.block_size
        if not _fills_up(self.shape.known_vocab, vocab):
            raise UsageError(
                f"{self.path}: its vocabulary has {counted(self.shape.known_vocab, 'token')}, and that of the data "
                f"{vocab:,}; name the data that it was trained on"
            )
        if block > self.shape.block_size and "wpe.weight" in self.tensors:
            raise UsageError(
                f"`block_size` {block}: {self.path} has learned {counted(self.shape.block_size, 'position')}; pass "
                f"{self.shape.block_size} or less"
            )
        rows = dict.fromkeys(VOCABULARY, vocab) | {"wpe.weight": block}

        def tensor(name: str) -> torch.Tensor:
            return self.tensors[name][: rows[name]] if name in rows else self.tensors[name]

        shapes = {name: (rows.get(name, shape[0]), *shape[1:]) for name, shape in self.tensors.shapes.items()}
        return LazyTensors(shapes, tensor)


def _fills_up(rows: int, tokens: int) -> bool:
    """Whether the rows are those of the tokens, filled up to a multiple of a power of two."""
    return 0 <= rows - tokens < min(rows & -rows, PADDING)


def open_model(
    source: str | Path, *, checkpoint: str = "best", download: bool = False, setting: str = "source"
) -> Source:
    """Find a model and check what can be checked without reading its weights; a run's hashes are checked.

    Args:
        source: a path or, if it is a text and no such path exists, a model's name on the hub.
        checkpoint: of a run's folder: best, latest, or a step's folder name.
        download: fetch a model of that name if it is not in the cache.
        setting: the argument that names the source, for messages.

    Raises:
        UsageError: there is no model, or one that is damaged or not supported.
    """
    path = Path(source)
    if isinstance(source, str) and could_be_hub_name(source):
        path = hub.folder(source, download, setting)
    opened = _open(path, checkpoint, setting)
    if checkpoint != "best" and opened.step is None:
        raise UsageError(f"`checkpoint` {checkpoint} is for the folder of a run, and {path} is none; leave it out")
    return opened


def _open(path: Path, checkpoint: str, setting: str) -> Source:
    is_folder = exists(path) and path.is_dir()
    is_step = STEP_NAME.fullmatch(path.name) and not exists(path / huggingface.CONFIG)
    if is_step and (is_folder or store.holds_run(path.parent)):
        if checkpoint not in ("best", path.name):
            raise UsageError(
                f"`checkpoint` {checkpoint} is for the folder of a run, and {path} is a step's; leave it out"
            )
        return _open_run(path.parent, path.name)
    if is_folder:
        if _is_huggingface(path):
            return _foreign("huggingface", huggingface.load(path))
        if (checkpoint_file := path / nanogpt_weights.CHECKPOINT).exists() and not (path / "config.json").exists():
            return _foreign("nanogpt", nanogpt_weights.load(checkpoint_file))
        if setting != "out_dir" and not (store.holds_run(path) or store.aside(path)):
            raise UsageError(f"`{setting}` {path} holds no run, and is no other model; {WAYS_OUT}")
        return _open_run(path, checkpoint)
    if path.suffix == ".gguf":
        return _foreign("gguf", gguf_file.load(path))
    if path.suffix == ".pt":
        return _foreign("nanogpt", nanogpt_weights.load(path))
    if exists(path):
        raise UsageError(f"`{setting}` {path} is no model; {WAYS_OUT}")
    raise UsageError(
        f"`{setting}` {path} holds no run, and is no other model; train one first: python -m fastgpt.train "
        f"--out_dir {path}"
    )


def _is_huggingface(folder: Path) -> bool:
    config = folder / huggingface.CONFIG
    if not config.exists() or (folder / "latest").exists():
        return any((folder / name).exists() for name in (huggingface.WEIGHTS, huggingface.INDEX, *huggingface.PICKLES))
    return not isinstance(json_files.read_object(config).get("config"), dict)


def _open_run(out_dir: Path, checkpoint: str) -> Source:
    step = store.find(out_dir, checkpoint)
    config, about = run_folder.load(out_dir)
    vocabulary = saved.load(out_dir / "tokenizer.json")
    store.verify(step, (store.MODEL, store.STATE))
    store.check_vocabulary(step, vocabulary)
    tensors = store.load_weights(step)
    shape = dataclasses.replace(config.architecture(), vocab_size=vocabulary.vocab_size)
    described, held = count_parameters(shape), sum(map(_numbers, tensors.shapes.values()))
    if described != held:
        raise CorruptCheckpoint(
            f"{out_dir / 'config.json'} describes {counted(described, 'parameter')}, and "
            f"{step / store.MODEL} holds {held:,}; put the run's own config.json back"
        )
    return Source(out_dir, "fastgpt", shape, tensors, lambda: vocabulary, step, about)


def _numbers(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _foreign(format: str, model: ForeignModel) -> Source:
    _check_shapes(model)
    return Source(model.path, format, model.shape, model.tensors, model.read_tokenizer)


def _check_shapes(model: ForeignModel) -> None:
    """Raise `UsageError` if the tensors are not those of the shape."""
    found, path = model.tensors.shapes, model.path
    layers = 1 + max((int(match[1]) for name in found if (match := LAYER.match(name))), default=-1)
    if layers != model.shape.n_layer:
        described = counted(model.shape.n_layer, "layer")
        raise UsageError(f"{path}: its settings describe {described}, and its weights have {layers:,}")
    wanted = parameter_shapes(model.shape)
    for what, names in (("lacks", wanted.keys() - found.keys()), ("has an unknown", found.keys() - wanted.keys())):
        if names:
            first, more = min(names), f" and {len(names) - 1:,} more" if len(names) > 1 else ""
            named = first if first.isprintable() else shown(first)
            raise UsageError(f"{path} {what} tensor {named:.80}{more}; take the whole model anew")
    for name, shape in wanted.items():
        if found[name] != shape:
            raise UsageError(f"{path}: its {name} is {found[name]}, and its settings need {shape}")
