"""Compile recursions.py with mypyc; where that fails for want of a C compiler, install the Python source alone."""

from mypyc.build import mypycify
from setuptools import setup

# separate: the compiled code stands inside the package, so that an editable install can build it in place.
# silent, ignore-missing: NumPy is not in the build environment, and __init__.py, which needs it, is not compiled.
extensions = mypycify(["--follow-imports=silent", "--ignore-missing-imports", "recursions.py"], separate=True)
for extension in extensions:
    extension.optional = True
    if "-O3" in extension.extra_compile_args:  # GCC and Clang; MSVC does not contract unless told to
        extension.extra_compile_args = [*extension.extra_compile_args, "-ffp-contract=off"]

setup(ext_modules=extensions)
