# Triton's own type hints describe Python, and the body of a `@triton.jit` function is Triton's language: with them
# pyright 1.1.414 finds 30 errors in correct kernels under Triton 3.9 and none under 3.7. So every name of Triton is
# Any here, the same with each version and where Triton is not installed.
from typing import Any

def __getattr__(name: str) -> Any: ...
