"""``python -m tvm_gdn``: the same as the command ``tvm_gdn``."""

from __future__ import annotations

import sys

from tvm_gdn.cli import main

if __name__ == "__main__":
    sys.exit(main())
