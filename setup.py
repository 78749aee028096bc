"""Builds the compiled kernels with the package; everything else is in pyproject.toml.

The library is no Python module: `diloco.kernels.native` loads it with ctypes. Without a C++ compiler the build goes on
without it, and the torch reference computes the same bits.
"""

from __future__ import annotations

import sys

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FLAGS = [
    *("-std=c++17", "-O3", "-g0", "-pthread"),
    # No fused multiply-add: the definition rounds after every operation.
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    # The compiler's own AVX-512 headers set it off.
    "-Wno-maybe-uninitialized",
]


class Build(build_ext):
    def get_export_symbols(self, ext: Extension) -> list[str]:
        """Without the PyInit_ function that a module would have."""
        return list(ext.export_symbols or [])


kernels = Extension(
    "diloco.kernels._native",
    sources=["kernels/csrc/diloco_kernels.cpp", "kernels/csrc/orthogonal.cpp"],
    depends=["kernels/csrc/orthogonal_threads.h", "kernels/csrc/orthogonal_tiles.h"],
    extra_compile_args=FLAGS,
    extra_link_args=["-pthread"],
    language="c++",
    optional=True,
)

setup(ext_modules=[] if sys.platform == "win32" else [kernels], cmdclass={"build_ext": Build})
