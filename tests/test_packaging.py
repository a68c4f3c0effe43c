"""What is shipped is what is in the tree."""

from __future__ import annotations

import re
import tomllib
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_package_list_is_the_tree() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT / "src") for path in ROOT.glob("src/**/*.py")}
    assert sorted(listed) == sorted(
        ".".join(("vhost_device_console", *folder.parts)) for folder in folders
    )


def test_nothing_imports_src_as_a_package() -> None:
    sources = [
        path
        for place in ("src", "tests", "benchmarks", "contrib")
        for path in (ROOT / place).rglob("*")
        if path.is_file()
        and (path.suffix == ".py" or path.read_bytes().startswith(b"#!/usr/bin/env python"))
    ]
    assert sources
    imports = re.compile(r"^\s*(from|import) +src\b", re.MULTILINE)
    assert [path for path in sources if imports.search(path.read_text())] == []


def test_every_tested_version_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = chain(project["dependencies"], *project["optional-dependencies"].values())
    pinned = set(re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    names = {re.split("[<>=~!;[ ]", requirement)[0] for requirement in wanted}
    assert names - pinned == {project["name"]}
