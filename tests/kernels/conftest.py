"""Makes the tests' own oracle importable (tests are no package) and chooses how Triton runs here."""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

if not torch.cuda.is_available():
    # Read when triton is first imported: without a GPU the same kernels run in its interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def poisoned_allocations():
    """Uninitialized memory is NaN (or the largest integer) while a test runs."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
