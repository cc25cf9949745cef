"""`python -m phsa_megatron.preflight RUN/config.yaml`, once per node."""

from __future__ import annotations

import sys

from phsa_megatron.preflight.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
