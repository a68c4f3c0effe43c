"""A vhost-user backend for the virtio console.

One idea carries it: a console is a journal with a keyboard. See ARCHITECTURE.md.
"""

import os as _os

__version__ = "0.1.0"


def _stay_plain() -> None:
    """Import every module's .py, also where a compiled one lies beside it."""
    import sys
    from importlib.machinery import SOURCE_SUFFIXES, FileFinder, SourceFileLoader

    for folder, _, _ in _os.walk(__path__[0]):
        finder = FileFinder(folder, (SourceFileLoader, SOURCE_SUFFIXES))
        sys.path_importer_cache[folder] = finder


if _os.environ.get("VHOST_DEVICE_CONSOLE_PURE"):
    _stay_plain()


def core() -> str:
    """Return "compiled core" or "plain Python", whichever is in use."""
    from . import journal

    return "plain Python" if journal.__file__.endswith(".py") else "compiled core"
