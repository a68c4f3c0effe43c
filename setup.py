"""The optional compiled core: some modules as Cython compiles them, from the files that also run.

Types are in the .pxd beside each. Without a C compiler, or in an editable installation, whose files
are meant to be changed, everything stays plain Python.
"""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import Extension, setup

PACKAGE = "vhost_device_console"
SOURCES = Path("src")

#: Of the fence there is C in its .pxd, and nothing to compile.
NOT_COMPILED = "fence"


def core() -> list[Extension]:
    """Return the modules to compile, where something is to be built."""
    if not {"bdist_wheel", "build", "build_ext"}.intersection(sys.argv):
        return []
    from Cython.Build import cythonize

    # Cython takes a module's package for the folders that it lies in, and ours is called src.
    root = Path("build") / "core"
    root.mkdir(parents=True, exist_ok=True)
    if not (root / PACKAGE).is_symlink():
        (root / PACKAGE).symlink_to(Path("../..") / SOURCES)
    typed = [path.relative_to(SOURCES).with_suffix(".py") for path in SOURCES.rglob("*.pxd")]
    extensions: list[Extension] = cythonize(
        [
            Extension(
                ".".join((PACKAGE, *path.with_suffix("").parts)),
                [str(root / PACKAGE / path)],
                extra_compile_args=["-O2", "-g0"],
                optional=True,
            )
            for path in typed
            if path.stem != NOT_COMPILED
        ],
        include_path=[str(root)],
        build_dir=str(root / "c"),
        language_level=3,
        compiler_directives={
            "annotation_typing": False,
            "cdivision": True,
            "initializedcheck": False,
        },
    )
    return extensions


setup(ext_modules=core())
