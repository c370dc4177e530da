"""Computes the next token of one sequence on a CPU in machine code that is compiled for the model.

    decoder = CompiledDecoder(model)       # compiles, or loads what an earlier run compiled
    logits = decoder(token, slots, keys, values)

One function computes a layer from its weights. It is compiled once and called for each layer of the model, so a deep
model compiles as fast as a shallow one. The embedding and the output layer are two more such functions. All three are
`GPT.embed`, `Block.forward` and `GPT.logits`, exported with `torch.export` and compiled by AOTInductor. They are kept
in the cache folder, under a hash of what they depend on. The products are `fastgpt_kernels.row_product`.

The speed limit is that of reading the weights. Nothing else is computed between them: they fill the processor's caches,
so that even a small operation of PyTorch costs several times what it costs in a loop of its own.
"""

import hashlib
import platform
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
from torch.func import functional_call

from fastgpt.errors import UsageError
from fastgpt.model import gpt
from fastgpt.model.gpt import GPT, add_norm
from fastgpt.model.kv_cache import DenseCache
from fastgpt.model.linear import store_by_rows
from fastgpt.ops.table import Ops
from fastgpt.system import caches, torch_private
from fastgpt.system.files import TEMPORARY
from fastgpt_kernels import row_product

OPTIONS = {
    "cpp.enable_floating_point_contract_flag": "fast",
    "aot_inductor.compile_wrapper_opt_level": "O0",  # for the code that calls the kernels, which is most of the code
}
# The sources that the compiled code depends on, beside shapes, compiler and processor.
PARTS = ("gpt", "positions", "activations", "linear", "int8")
KERNELS = ("row_product", "float32_product", "torch_ops", "reference")
SOURCES = [Path(__file__), *(Path(gpt.__file__).with_name(f"{name}.py") for name in PARTS)]
SOURCES += [Path(row_product.__file__).with_name(f"{name}.py") for name in KERNELS]


class CannotCompile(UsageError):
    """This machine or this model cannot have a compiled decoder."""


@dataclass(frozen=True)
class _OneLayer:
    """The cache of one layer, as the compiled function sees it: keys and values (slots, Hkv, D)."""

    keys: torch.Tensor
    values: torch.Tensor
    slots: torch.Tensor  # int64 (S,): the slots of the sequence's positions, the new token's last

    def positions(self, T: int) -> torch.Tensor:
        raise AssertionError("the token is embedded before the layers")

    def attend(self, ops: Ops, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Write k and v (1, 1, Hkv, D), and attend to all slots: q (1, 1, H, D) -> the same shape."""
        (_, _, H, D), Hkv = q.shape, k.shape[2]
        here = self.slots[-1:]
        self.keys.index_copy_(0, here, k[0])
        self.values.index_copy_(0, here, v[0])
        keys, values = self.keys[self.slots].float(), self.values[self.slots].float()  # each (S, Hkv, D)
        grouped = row_product.in_memory(q.float() * D**-0.5, (Hkv, H // Hkv, D))
        weights = (keys[:, :, None] * grouped).sum(-1).softmax(0)  # (S, Hkv, H / Hkv)
        return (weights[..., None] * values[:, :, None]).sum(0).to(q.dtype).view(1, 1, H, D)

    def advance(self, tokens: int) -> None:
        raise AssertionError("the token is counted after the layers")


class _Part(nn.Module):
    """A part of the model's computation. `reads`: prefixes of the names of the weights that it reads."""

    reads: tuple[str, ...]


class _Embedding(_Part):
    """The residual stream of a token, the branch that the first layer adds to it, and the rotation, if rotary."""

    reads = ("model.wte.", "model.wpe.", "model.table")

    def __init__(self, model: GPT):
        super().__init__()
        self.model = model

    def forward(self, token, slots):
        x, rotation = self.model.embed(token[None], torch.arange(slots.shape[0] - 1, slots.shape[0]))
        return (x, torch.zeros_like(x)) if rotation is None else (x, torch.zeros_like(x), rotation)


class _Layer(_Part):
    """A block."""

    reads = ("block.",)

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x, branch, rotation, slots, keys, values):
        return self.block(x, branch, rotation, None, None, _OneLayer(keys, values, slots))


class _Head(_Part):
    """The final norm and the logits."""

    reads = ("model.wte.", "model.lm_head.", "model.ln_f.")

    def __init__(self, model: GPT):
        super().__init__()
        self.model = model

    def forward(self, x, branch):
        return self.model.logits(add_norm(self.model.ops, x, branch, self.model.ln_f)[1])[0]


class _Pure(nn.Module):
    """A part as a function of its inputs and weights. The weights are no parameters, so the code does not hold them."""

    def __init__(self, part: _Part):
        super().__init__()
        self.part, self.names = (part,), tuple(_weights(part))

    def forward(self, inputs, weights):
        return functional_call(self.part[0], dict(zip(self.names, weights, strict=True)), tuple(inputs))


def _weights(part: _Part) -> dict[str, torch.Tensor]:
    """The weights that a part reads, by name."""
    named = {**dict(part.named_parameters()), **dict(part.named_buffers())}
    return {name: tensor for name, tensor in named.items() if name.startswith(part.reads)}


class CompiledDecoder:
    """The compiled forward pass of a model in evaluation mode, for one token of one sequence.

    Attributes:
        embedding, layer, head: the compiled functions, from a list of tensors to a list of tensors.
        seconds: spent compiling; 0.0 where an earlier run had compiled it.
    """

    def __init__(self, model: GPT, announce: Callable[[str], None] | None = None):
        """Compile the model, or load what an earlier run compiled.

        `announce` is called with a sentence before compiling begins.

        Raises:
            CannotCompile: the model is not on a CPU or runs Triton kernels, or there is no compiler.
        """
        self.model, self._announce = model, announce
        if model.device.type != "cpu":
            raise CannotCompile(f"`compile`: the compiled decoder is for a CPU, and the model is on {model.device}")
        if others := set(model.ops.backends.values()) - {"torch", "reference"}:
            raise CannotCompile(f"`compile`: the compiled decoder is PyTorch alone, without kernels of {others.pop()}")
        store_by_rows(model)
        embedding, layers, head = _Embedding(model), [_Layer(block) for block in model.h], _Head(model)
        self._embedding_weights, self._head_weights = (list(_weights(part).values()) for part in (embedding, head))
        self._layers = [list(_weights(layer).values()) for layer in layers]
        self.seconds = 0.0
        config, slots, token = model.config, torch.arange(3), torch.zeros(1, dtype=torch.int64)
        self.embedding = self._function("embedding", embedding, [token, slots], {1: "S"})
        with torch.no_grad():
            x, branch, *rotation = embedding(token, slots)
        cache = torch.zeros(4, config.kv_heads, config.head_dim, dtype=x.dtype)
        inputs = [x, branch, *(rotation or [None]), slots, cache, cache.clone()]
        self.layer = self._function("layer", layers[0], inputs, {3: "S", 4: "slots", 5: "slots"})
        self.head = self._function("head", head, [x, branch], {})

    def __call__(
        self, token: torch.Tensor, slots: torch.Tensor, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """The logits (1, V) of what follows the token.

        Args:
            token: int64 (1,), at the last position of the sequence.
            slots: int64 (S,), S >= 2: the slots of the sequence's positions in keys and values, the token's last.
            keys, values: of each layer, (slots, Hkv, D); the token's are written to its slot.
        """
        x, branch, *rotation = self.embedding([token, slots, *self._embedding_weights])
        for weights, k, v in zip(self._layers, keys, values, strict=True):
            x, branch = self.layer([x, branch, *rotation, slots, k, v, *weights])
        return self.head([x, branch, *self._head_weights])[0]

    def _function(
        self, name: str, part: _Part, inputs: list[torch.Tensor | None], free: dict[int, str]
    ) -> Callable[[list], list]:
        """The part as machine code: from a list of its inputs, without None, and its weights to its outputs.

        `free`: the inputs that may have any length from 2 on, and the name of that length.
        """
        weights = list(_weights(part).values())
        path = cache_folder() / f"{name}-{self.key(name, [*inputs, *weights])}.pt2"
        if path.exists():
            try:
                return torch_private.load_package(path)
            except RuntimeError:  # damaged
                path.unlink()
        if self._announce and not self.seconds:
            self._announce("compiling the decoder for a model of this shape: up to a minute, once")
        began = time.perf_counter()
        _compile(_Pure(part), (inputs, weights), free, path)
        self.seconds += time.perf_counter() - began
        return torch_private.load_package(path)

    def key(self, name: str, inputs: Sequence[torch.Tensor | None]) -> str:
        """A hash of all that the code depends on: sizes, settings, sources, compiler and processor."""
        model = self.model
        tensors = [None if t is None else (tuple(t.shape), t.stride(), t.dtype) for t in inputs]
        says = [name, model.config, dict(model.ops.backends), tensors, torch.__version__, torch.get_num_threads()]
        says += [_processor(), *(source.read_bytes() for source in SOURCES)]
        return hashlib.sha256(repr(says).encode()).hexdigest()[:24]


class DenseDecoder:
    """Runs a `CompiledDecoder` on the only sequence of a dense cache."""

    def __init__(self, decoder: CompiledDecoder, cache: DenseCache):
        self.decoder, self.cache = decoder, cache
        self.slots = torch.arange(cache.capacity)
        self.keys, self.values = ([t[0] for t in layers] for layers in (cache.keys, cache.values))

    def __call__(self, token: torch.Tensor) -> torch.Tensor:
        """Append a token (1,) to the sequence, which is not empty; the logits (1, V) of what follows it."""
        end = self.cache.positions(1).stop
        logits = self.decoder(token, self.slots[:end], self.keys, self.values)
        self.cache.advance(1)
        return logits


def cache_folder() -> Path:
    """The folder of compiled functions. May not exist."""
    return caches.cache_dir() / "compiled"


def _compile(module: _Pure, given: tuple[list, list], free: dict[int, str], path: Path) -> None:
    inputs, weights = given
    named = {name: torch.export.Dim(name, min=2, max=1 << 40) for name in free.values()}
    sizes = [{0: named[free[place]]} if place in free else None for place in range(len(inputs))]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=path.parent) as folder,
            torch.no_grad(),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore", FutureWarning)  # PyTorch warns of its own code
            exported = torch.export.export(module, given, dynamic_shapes=(sizes, [None] * len(weights)), strict=False)
            package = Path(folder) / "part.pt2"
            torch_private.compile_to_package(exported, package, OPTIONS)
            package.replace(path)
    except torch_private.NoCompiler:
        reason = "needs a C++ compiler, found none; install g++, or pass `compile=False`"
        raise CannotCompile(f"`compile` {reason}") from None
    except torch_private.CompilationFailed as error:
        raise CannotCompile(f"`compile` failed: {error}; mend that, or pass `compile=False`") from error
    except OSError as error:
        raise CannotCompile(
            f"`compile`: {path.parent} cannot be written: {error.strerror}; set FASTGPT_CACHE, or pass `compile=False`"
        ) from None


def _processor() -> str:
    """The instructions that machine code for this processor may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return f"{platform.machine()} {platform.processor()}"
