"""Every private name of PyTorch that fastgpt uses, so that a new version of PyTorch is checked in one place.

PyTorch promises nothing about a name with a leading underscore. All of these were checked with PyTorch 2.11, 2.13 and
2.14, the versions that this project has run with; `tests/system/test_torch_private.py` finds a private name that is
used elsewhere. What is slow to import, the compiler, is imported when it is needed. The kernels' own names are in
`fastgpt_kernels.torch_private`.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

# The class of modes that see every operation. No public name: PyTorch documents it in its notes on extending PyTorch.
from torch.utils._python_dispatch import TorchDispatchMode as OperationsMode

# The key of `torch.amp.GradScaler.state_dict()` that counts steps without an overflow since the scale last changed.
# No public name: the scaler has getters for the other four values, but its dict alone brings all of them back.
GROWTH_TRACKER = "_growth_tracker"


class NoCompiler(RuntimeError):
    """The machine has no C++ compiler."""


class CompilationFailed(RuntimeError):
    """The compiler refused the code; the message is its first line that names an error."""


# Arithmetic


def add_to_each(tensors: list[torch.Tensor], amount: float | torch.Tensor) -> None:
    """Add one amount to every tensor in place, in one call.

    No public name: `Tensor.add_` takes one tensor, and PyTorch's optimizers use this one.
    """
    torch._foreach_add_(tensors, amount)  # pyright: ignore[reportPrivateImportUsage]


def add_param_group(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> None:
    """`Optimizer.add_param_group` without an import of PyTorch's compiler, which is slow to import.

    No public name: PyTorch's decorator, which keeps the compiler out of the method, imports it. It holds the method
    itself as `__wrapped__`.
    """
    method = torch.optim.Optimizer.add_param_group
    getattr(method, "__wrapped__", method)(optimizer, group)


def fused_adamw(
    parameters: list[torch.Tensor],
    gradients: list[torch.Tensor],
    averages: list[torch.Tensor],
    squares: list[torch.Tensor],
    steps: list[torch.Tensor],
    **settings: Any,
) -> None:
    """One AdamW update of all parameters in place, by PyTorch's fused kernel.

    No public name: `torch.optim.AdamW(fused=True)` calls it, after Python work that costs a small model much of a step.

    Args:
        averages, squares: the moments, exp_avg and exp_avg_sq.
        steps: float32 scalars that count the updates, this one included.
        settings: lr, beta1, beta2, weight_decay, eps, amsgrad, maximize and found_inf.
    """
    torch._fused_adamw_(  # pyright: ignore[reportPrivateImportUsage]
        parameters, gradients, averages, squares, [], steps, **settings
    )


# Memory


def storage_address(storage: torch.UntypedStorage) -> int:
    """The address of a storage in C++, which identifies it as long as it lives.

    No public name: `data_ptr` is 0 for every storage without memory.
    """
    return storage._cdata


def tensors_in(result: Any) -> Iterator[torch.Tensor]:
    """The tensors in the result of an operation: itself, or those in its lists and tuples.

    No public name: PyTorch's own trees of values have none.
    """
    from torch.utils._pytree import tree_leaves

    return (leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))


@contextlib.contextmanager
def fake_tensors() -> Iterator[None]:
    """Within the block tensors have shapes, dtypes and devices but no memory, and nothing is computed.

    A number that the host reads is 1 or true. So code that decides by the value of a tensor takes one way.

    No public name: PyTorch exports the mode for its compiler alone.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    class Reads(OperationsMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
            if func is torch.ops.aten._local_scalar_dense.default:
                dtype = args[0].dtype
                return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
            return func(*args, **(kwargs or {}))

    with FakeTensorMode(), Reads():
        yield


# Devices


def cpu_multiplies_bfloat16() -> bool:
    """Whether the CPU has AVX512-BF16 or AMX.

    No public name: `torch.backends.cpu.get_cpu_capability` tells neither.
    """
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def cpu_has_bfloat16_tiles() -> bool:
    """Whether the CPU has AMX, whose products of bfloat16 are several times as fast as those of float32.

    No public name: `torch.backends.cpu.get_cpu_capability` does not tell.
    """
    return torch.cpu._is_amx_tile_supported()


def sdpa_choice(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **settings: Any) -> int:
    """The `torch.nn.attention.SDPBackend` that `F.scaled_dot_product_attention` takes for this call, as a number.

    No public name: PyTorch shows the choice only in a profile.
    """
    return torch._fused_sdp_choice(q, k, v, **settings)  # pyright: ignore[reportPrivateImportUsage]


def spin_gpu(cycles: int) -> None:
    """Let the current CUDA stream wait for so many clock cycles, while the host goes on.

    No public name: PyTorch has this kernel for its own tests.
    """
    torch.cuda._sleep(cycles)


def leave_pool(pool: Any) -> None:
    """Make the CUDA allocator stop recording to the memory pool of a capture that failed, and release the pool.

    Up to PyTorch 2.13 a `CUDAGraph.capture_end` that fails leaves the allocator recording: then `empty_cache` fails,
    and so does all that frees memory for others. In versions that leave the pool themselves nothing happens here.

    No public name: `torch.cuda.use_mem_pool` does both, but only for pools that it began to use itself.
    """
    with contextlib.suppress(RuntimeError):  # the first call raises where the allocator is not recording
        index = torch.cuda.current_device()
        torch._C._cuda_endAllocateToPool(index, pool)
        torch._C._cuda_releasePool(index, pool)


# Profiling


def profiled_range(name: str) -> contextlib.AbstractContextManager:
    """A range of this name in the profile that is being made.

    No public name: `torch.profiler.record_function` makes the same range, but takes ten times as long (7 us), as long
    as what it surrounds in small models. PyTorch's compiler uses this one.
    """
    return torch._C._profiler._RecordFunctionFast(name)  # pyright: ignore[reportAttributeAccessIssue]


# Compiling


@contextlib.contextmanager
def compile_up_to(versions: int) -> Iterator[None]:
    """Within the block torch.compile makes up to so many versions of a function, and not 8, before it gives up.

    No public name: `torch.compile` has no argument for the limit. Importing its configuration takes seconds, and
    imports triton.
    """
    from torch._dynamo import config

    with config.patch(recompile_limit=versions):
        yield


@contextlib.contextmanager
def equal_sizes_apart() -> Iterator[None]:
    """Within the block torch.compile with `dynamic=True` does not take sizes for the same because they are equal.

    No public name: `torch.compile` has no argument for this. Otherwise a batch as large as its page table is wide would
    be compiled for such batches alone.
    """
    from torch.fx.experimental import _config

    with _config.patch(use_duck_shape=False):  # pyright: ignore[reportAttributeAccessIssue]
        yield


def compile_error() -> type[Exception]:
    """The class of the errors that torch.compile raises for what it cannot compile.

    No public name: `torch.compiler` exports no exception. Importing it takes seconds.
    """
    from torch._dynamo.exc import TorchDynamoException

    return TorchDynamoException


def compile_to_package(exported: torch.export.ExportedProgram, path: Path, options: Mapping[str, Any]) -> None:
    """Compile an exported program ahead of time into a file, by AOTInductor.

    No public name: PyTorch documents `torch._inductor.aoti_compile_and_package` as the way to do this.

    Args:
        options: settings of inductor.

    Raises:
        NoCompiler, CompilationFailed
        OSError: the file cannot be written.
    """
    from torch._inductor import aoti_compile_and_package, exc

    try:
        aoti_compile_and_package(exported, package_path=str(path), inductor_configs=dict(options))
    except (exc.InductorError, exc.InvalidCxxCompiler, exc.CppCompileError) as error:
        cause = error.inner_exception if isinstance(error, exc.InductorError) else error
        if isinstance(cause, exc.InvalidCxxCompiler):
            raise NoCompiler from None
        lines = cause.output.splitlines() if isinstance(cause, exc.CppCompileError) else str(cause).splitlines()
        said = next((line for line in lines if "error" in line), lines[0] if lines else type(cause).__name__)
        raise CompilationFailed(said.strip()) from error


def load_package(path: Path) -> Callable[[list], list]:
    """The function in a file of `compile_to_package`: from a list of tensors, which it clears, to a list of tensors.

    No public name: `torch._inductor.aoti_load_package` makes the same object, but imports the compiler, which takes
    seconds.

    Raises:
        RuntimeError: the file is damaged.
    """
    loader = torch._C._aoti.AOTIModelPackageLoader  # pyright: ignore[reportAttributeAccessIssue]
    return loader(str(path), "model", True, 1, -1).boxed_run
