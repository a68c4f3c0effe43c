"""apt-get as an ordinary user: lists, cache and downloads in a folder of one's own.

Nothing on the system is changed, and apt's signature checks stay as they are.
"""

from __future__ import annotations

import os
import platform
import subprocess
import tempfile
from pathlib import Path

BUILD = Path(__file__).resolve().parent.parent / "build"

#: What a sources file may call a Debian suite instead of its code name.
_ALIASES = {"stable", "oldstable", "testing", "unstable", "sid"}

_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


class UnobtainableError(Exception):
    """A package cannot be had here; the message says why in one line."""


def release() -> dict[str, str]:
    """Return what this machine says of its own distribution (os-release(5))."""
    try:
        return platform.freedesktop_os_release()
    except OSError:
        return {}


class Apt:
    """Downloads from this machine's own sources, or from another `suite` of its archive.

    The environment variable VDC_APT names another program to run in the place of apt-get.
    """

    def __init__(self, suite: str | None = None) -> None:
        folder = BUILD / "apt" / (suite or "own")
        for made in ("lists/partial", "cache/archives/partial", "debs"):
            (folder / made).mkdir(parents=True, exist_ok=True)
        (folder / "status").touch()  # what is installed here does not matter
        self._debs = folder / "debs"
        self._program = os.environ.get("VDC_APT", "apt-get")
        self._options = [
            f"-oDir::State::lists={folder / 'lists'}",
            f"-oDir::State::status={folder / 'status'}",
            f"-oDir::Cache={folder / 'cache'}",
            "-oAcquire::Languages=none",
            "-oAcquire::Check-Valid-Until=false",  # an old archive's signatures still hold
            "-oAPT::Sandbox::User=",
        ]
        if suite is not None:
            sources = folder / "suite.sources"
            sources.write_text(_sources(suite, Apt().archives()))
            self._options += [f"-oDir::Etc::sourcelist={sources}", "-oDir::Etc::sourceparts=-"]

    def download(self, *packages: str) -> list[Path]:
        """Return the packages' files, downloaded unless they are here already.

        Raises UnobtainableError.
        """
        if missing := [package for package in packages if self._here(package) is None]:
            # One broken source must not hide what the others have: the download decides.
            update = self._run("update")
            # What is broken off leaves nothing that looks like a package.
            with tempfile.TemporaryDirectory(dir=self._debs, prefix=".") as scratch:
                download = self._run("download", *missing, cwd=scratch)
                if download.returncode:
                    raise self._failure(download, update)
                for file in Path(scratch).glob("*.deb"):
                    file.rename(self._debs / file.name)
        found = [path for package in packages if (path := self._here(package)) is not None]
        if len(found) < len(packages):
            raise UnobtainableError(f"{self._program} downloaded nothing")
        return found

    def closure(self, package: str) -> list[str]:
        """Return the names of `package` and of all it depends on, as the archive is now.

        Forgets files that are not of the versions that belong together. Raises UnobtainableError.
        """
        update = self._run("update")
        plan = self._run("install", "--print-uris", "--no-install-recommends", "-y", package)
        if plan.returncode:
            raise self._failure(plan, update)
        files = [line.split()[1] for line in plan.stdout.splitlines() if line.startswith("'")]
        names = [file.partition("_")[0] for file in files]
        for name, file in zip(names, files, strict=True):
            for other in set(self._debs.glob(f"{name}_*.deb")) - {self._debs / file}:
                other.unlink()
        return names

    def _here(self, package: str) -> Path | None:
        return next(self._debs.glob(f"{package}_*.deb"), None)

    def _failure(self, *runs: subprocess.CompletedProcess[str]) -> UnobtainableError:
        output = "".join(run.stderr for run in runs).splitlines()
        errors = [line[3:] for line in output if line.startswith("E: ")]
        return UnobtainableError(errors[0] if errors else f"{self._program} failed")

    def _run(
        self, *arguments: str, cwd: str | Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(
                [self._program, "-q", *self._options, *arguments],
                cwd=cwd,
                env={**os.environ, "LC_ALL": "C"},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
            )
        except OSError as error:
            raise UnobtainableError(f"cannot run {self._program}: {error.strerror}") from None

    def archives(self) -> list[str]:
        """Return the addresses from which this machine takes its own suite."""
        suites = _ALIASES | {release().get("VERSION_CODENAME", "")}
        form = "$(REPO_URI) $(RELEASE) $(COMPONENT)"
        targets = self._run(
            "indextargets", "--no-release-info", "--format", form, "Created-By: Packages"
        )
        entries = (line.split(" ") for line in targets.stdout.splitlines())
        return [
            entry[0]
            for entry in dict.fromkeys(map(tuple, entries))
            if entry[1:] in {(suite, "main") for suite in suites}
        ]


def _sources(suite: str, archives: list[str]) -> str:
    """Return sources.list(5) in its deb822 form."""
    if release().get("ID") != "debian" or not archives:
        raise UnobtainableError("this machine's apt sources name no Debian archive")
    fields = {
        "Types": "deb",
        "URIs": " ".join(archives),
        "Suites": suite,
        "Components": "main",
        "Targets": "Packages",
    }
    if _KEYRING.exists():
        fields["Signed-By"] = str(_KEYRING)
    return "".join(f"{name}: {value}\n" for name, value in fields.items())
