"""What tests need of the system beside the C compiler that kernels need."""

import shutil

import pytest

needs_cxx = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="emulated devices and torch.compile need a C++ compiler"
)
