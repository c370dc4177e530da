"""A batch that does not fit is computed in halves, in its order."""

import pytest
import torch

from fastgpt.system.out_of_memory import in_halves


@pytest.mark.parametrize("rows", [1, 2, 5, 8])
@pytest.mark.parametrize("fit", [1, 2, 3, 8])
def test_parts_are_as_large_as_they_fit_and_in_order(rows: int, fit: int):
    def compute(numbers: list[int], tensor: torch.Tensor) -> list[int]:
        assert numbers == tensor.tolist()
        if len(numbers) > fit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return numbers

    parts = in_halves(compute, list(range(rows)), torch.arange(rows))
    assert [number for part in parts for number in part] == list(range(rows))
    assert max(map(len, parts)) <= fit
    assert len(parts) == 1 or rows > fit


def test_what_is_no_lack_of_memory_passes_and_so_does_a_single_row():
    def fail(error: Exception):
        def compute(rows: list[int]) -> None:
            raise error

        return compute

    with pytest.raises(ValueError, match="else"):
        in_halves(fail(ValueError("something else")), [1, 2])
    with pytest.raises(torch.OutOfMemoryError):
        in_halves(fail(torch.OutOfMemoryError("CUDA out of memory")), [1, 2])
