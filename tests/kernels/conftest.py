"""Makes the tests' own oracle importable (tests are no package) and chooses how Triton runs here."""

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

if not torch.cuda.is_available():
    # Read when triton is first imported: without a GPU the same kernels run in its interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")
