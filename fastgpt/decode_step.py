"""The next token of one sequence on a CPU, in machine code made for it: a decode step that waits for memory alone.

    step = DecodeStep(model)          # compiles, or loads what an earlier run compiled
    logits = step(token, slots, keys, values)

A layer is compiled once, as one function of its weights, and called for each layer of the model, so that a deep model
takes no longer to compile than a shallow one; the output layer is a second such function. Both are what
`Block.forward` and `GPT.logits` say, exported with `torch.export` and compiled by AOTInductor, and are kept in the
cache folder by what they depend on. The products are `fastgpt_kernels.row_product`.
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

from fastgpt import tokenizer
from fastgpt.dispatch import Ops
from fastgpt.errors import UsageError
from fastgpt.files import TEMPORARY
from fastgpt.kv_cache import DenseCache
from fastgpt.linear import store_by_rows
from fastgpt.model import GPT, add_norm
from fastgpt_kernels import row_product

OPTIONS = {
    "cpp.enable_floating_point_contract_flag": "fast",
    "aot_inductor.compile_wrapper_opt_level": "O0",  # of what calls the kernels, which is most of the text
}
# What the compiled code depends on, beside shapes, compiler and processor.
SOURCES = [Path(__file__).with_name(f"{name}.py") for name in ("decode_step", "model", "gelu", "linear", "quantized")]
SOURCES += [Path(row_product.__file__).with_name(f"{name}.py") for name in ("row_product", "stock", "reference")]


class CannotCompile(UsageError):
    """This machine, or this model, has no compiled decode step."""


@dataclass(frozen=True)
class _OneLayer:
    """The cache of one layer as the compiled function sees it: keys and values (slots, Hkv, D)."""

    keys: torch.Tensor
    values: torch.Tensor
    slots: torch.Tensor  # int64 (S,): where the sequence's positions are; the last is the token's own

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


class _Layer(nn.Module):
    """A block as a function of its weights. They are no parameters here, so that they stay outside of the code."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.names = tuple(_weights(block))
        self.block = (block,)

    def forward(self, x, branch, rotation, slots, keys, values, weights):
        named = dict(zip(self.names, weights, strict=True))
        return functional_call(self.block[0], named, (x, branch, rotation, None, None, _OneLayer(keys, values, slots)))


class _Head(nn.Module):
    """The final norm and the logits as a function of their weights."""

    def __init__(self, model: GPT):
        super().__init__()
        self.names = tuple(_head_weights(model))
        self.model = (_Output(model),)

    def forward(self, x, branch, weights):
        return functional_call(self.model[0], dict(zip(self.names, weights, strict=True)), (x, branch))


class _Output(nn.Module):
    def __init__(self, model: GPT):
        super().__init__()
        self.wte, self.ln_f, self.model = model.wte, model.ln_f, (model,)

    def forward(self, x, branch):
        (model,) = self.model
        return model.logits(add_norm(model.ops, x, branch, self.ln_f)[1])[0]


def _weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _head_weights(model: GPT) -> dict[str, torch.Tensor]:
    return _weights(_Output(model))


class DecodeStep:
    """The compiled step of a model in evaluation mode.

    Attributes:
        layer, head: the compiled functions, from a list of tensors to a list of tensors.
        seconds: what compiling took; 0.0 where it was found compiled.
    """

    def __init__(self, model: GPT, announce: Callable[[str], None] | None = None):
        """Compile, or load. `announce` is called with a sentence before compiling begins.

        Raises:
            CannotCompile: the model is not on a CPU, runs kernels that are no PyTorch, or there is no compiler.
        """
        self.model, self._announce = model, announce
        if model.device.type != "cpu":
            raise CannotCompile(f"--compile: the compiled decode step is for a CPU, and the model is on {model.device}")
        if others := set(model.ops.columns.values()) - {"torch", "reference"}:
            raise CannotCompile(f"--compile: the decode step is PyTorch alone, without kernels of {others.pop()}")
        self._slots = torch.arange(model.config.block_size)
        store_by_rows(model)
        self._layers = [list(_weights(block).values()) for block in model.h]
        self._head_weights = list(_head_weights(model).values())
        self.seconds = 0.0
        x, rotation = self._embed(torch.zeros(1, dtype=torch.int64), 1)
        config = model.config
        cache = torch.zeros(4, config.kv_heads, config.head_size, dtype=x.dtype)
        slots = torch.arange(3)
        layer = (x, x.clone(), rotation, slots, cache, cache.clone(), self._layers[0])
        self.layer = self._function("layer", _Layer(model.h[0]), layer, {3: "S", 4: "slots", 5: "slots"})
        self.head = self._function("head", _Head(model), (x, x.clone(), self._head_weights), {})

    def __call__(
        self, token: torch.Tensor, slots: torch.Tensor, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """The logits (1, V) of what follows the token.

        Args:
            token: int64 (1,), whose position is the last of the slots.
            slots: int64 (S,), S >= 2: where the sequence's positions stand in keys and values, the token's own last.
            keys, values: of each layer, (slots, Hkv, D); the token's are written to its slot.
        """
        x, rotation = self._embed(token, len(slots))
        branch = torch.zeros_like(x)
        turned = [] if rotation is None else [rotation]
        for weights, k, v in zip(self._layers, keys, values, strict=True):
            x, branch = self.layer([x, branch, *turned, slots, k, v, *weights])
        return self.head([x, branch, *self._head_weights])[0]

    def extend(self, cache: DenseCache, token: torch.Tensor) -> torch.Tensor:
        """The logits (1, V) of what follows the next token (1,) of a cache's only sequence, which is not empty."""
        end = cache.positions(1).stop
        keys, values = ([t[0] for t in layers] for layers in (cache.keys, cache.values))
        logits = self(token, self._slots[:end], keys, values)
        cache.advance(1)
        return logits

    def _embed(self, token: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.model.embed(token[None], torch.tensor([length - 1]))

    def _function(self, name: str, module: nn.Module, inputs: tuple, free: dict[int, str]) -> Callable[[list], list]:
        """The module as machine code: a list of its tensors, in the order of `inputs`, to a list of its outputs.

        `free`: which inputs may have any length from 2 on, and what it is called.
        """
        path = cache_folder() / f"{name}-{self._key(name, inputs)}.pt2"
        if path.exists():
            try:
                return _load(path)
            except RuntimeError:  # damaged: it is made anew
                path.unlink()
        if self._announce and not self.seconds:
            self._announce("compiling the decode step for a model of this shape: up to a minute, once")
        began = time.perf_counter()
        _compile(module, inputs, free, path)
        self.seconds += time.perf_counter() - began
        return _load(path)

    def _key(self, name: str, inputs: tuple) -> str:
        """What the code depends on, as one word: sizes, settings, sources, compiler and processor."""
        model = self.model
        given = [t for part in inputs for t in (part if isinstance(part, list) else [part]) if t is not None]
        tensors = [(tuple(t.shape), t.stride(), t.dtype) for t in given]
        says = [name, model.config, dict(model.ops.columns), tensors, torch.__version__, torch.get_num_threads()]
        says += [_processor(), *(source.read_bytes() for source in SOURCES)]
        return hashlib.sha256(repr(says).encode()).hexdigest()[:24]


def cache_folder() -> Path:
    """Where compiled steps are kept. May not exist."""
    return tokenizer.cache_dir() / "compiled"


def _compile(module: nn.Module, inputs: tuple, free: dict[int, str], path: Path) -> None:
    from torch._inductor import aoti_compile_and_package, exc

    named = {name: torch.export.Dim(name, min=2, max=1 << 40) for name in free.values()}
    sizes = tuple(
        {0: named[free[place]]} if place in free else [None] * len(given) if isinstance(given, list) else None
        for place, given in enumerate(inputs)
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=path.parent) as folder,
            torch.no_grad(),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore", FutureWarning)  # PyTorch's, about its own code
            exported = torch.export.export(module, inputs, dynamic_shapes=sizes, strict=False)
            package = aoti_compile_and_package(exported, package_path=f"{folder}/step.pt2", inductor_configs=OPTIONS)
            Path(str(package)).replace(path)
    except (exc.InductorError, exc.InvalidCxxCompiler, exc.CppCompileError) as error:
        cause = error.inner_exception if isinstance(error, exc.InductorError) else error
        if isinstance(cause, exc.InvalidCxxCompiler):
            reason = "needs a C++ compiler, found none; install g++, or pass --no-compile"
            raise CannotCompile(f"--compile {reason}") from None
        lines = cause.output.splitlines() if isinstance(cause, exc.CppCompileError) else str(cause).splitlines()
        said = next((line for line in lines if "error" in line), lines[0] if lines else type(cause).__name__)
        raise CannotCompile(f"--compile failed: {said.strip()}; mend that, or pass --no-compile") from error
    except OSError as error:
        raise CannotCompile(
            f"--compile: {path.parent} cannot be written: {error.strerror}; set FASTGPT_CACHE, or pass --no-compile"
        ) from None


def _load(path: Path) -> Callable[[list], list]:
    # What torch._inductor.aoti_load_package does, without the seconds that importing the compiler takes.
    loader = torch._C._aoti.AOTIModelPackageLoader  # pyright: ignore[reportAttributeAccessIssue]
    return loader(str(path), "model", True, 1, -1).boxed_run


def _processor() -> str:
    """What machine code for this processor may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return f"{platform.machine()} {platform.processor()}"
