"""What a worker and the master may still do, and what is said of it."""

from __future__ import annotations

import errno
import logging
import mmap
import os
import pwd
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from vhost_device_console import landlock, privileges, seccomp
from vhost_device_console.admission import look_up
from vhost_device_console.errors import ConfigError
from vhost_device_console.health import Privileges
from vhost_device_console.kernel import prctl

from confined import in_child, loopback, status

ROOT = os.geteuid() == 0

as_root = pytest.mark.skipif(not ROOT, reason="needs root")

NOBODY = pwd.getpwnam("nobody")

FULL = Privileges(
    user="a",
    capabilities=[],
    no_new_privileges=True,
    landlock=7,
    seccomp=True,
    files=9,
    memory=5 << 20,
    missing=[],
)


def _works(restrict: Callable[[], object]) -> bool:
    def child() -> bool:
        prctl(38, 1)
        restrict()
        return True

    return in_child(child) is True


HAVE = (_works(landlock.restrict_self), _works(seccomp.restrict_self))


def confined(
    sandbox: bool = True, *, before: Callable[[], object] | None = None
) -> tuple[Privileges, dict[str, str]]:
    """Return what a child says that confined itself, and what its kernel says."""

    def child() -> tuple[Privileges, dict[str, str]]:
        if before is not None:
            before()
        with open("/proc/self/status") as file:
            said = privileges.confine_worker(sandbox, 0)
            lines = (line.partition(":") for line in file)
            return said, {key: value.strip() for key, _, value in lines}

    result: tuple[Privileges, dict[str, str]] = in_child(child)
    return result


def _become_nobody() -> None:
    os.setgroups([])
    os.setresgid(NOBODY.pw_gid, NOBODY.pw_gid, NOBODY.pw_gid)
    os.setresuid(NOBODY.pw_uid, NOBODY.pw_uid, NOBODY.pw_uid)


# Workers


@pytest.mark.parametrize("user", ["same", pytest.param("nobody", marks=as_root)])
def test_a_worker_has_no_capabilities_and_gets_none(user: str) -> None:
    said, kernel = confined(before=_become_nobody if user == "nobody" else None)
    sets = {kernel[f"Cap{name}"] for name in ("Inh", "Prm", "Eff", "Amb")}
    assert (sets, kernel["NoNewPrivs"]) == ({"0" * 16}, "1")
    assert (said.capabilities, said.no_new_privileges) == ([], True)


@pytest.mark.parametrize("user", ["same", pytest.param("nobody", marks=as_root)])
def test_a_worker_is_in_the_sandbox_that_it_says(user: str) -> None:
    said, kernel = confined(before=_become_nobody if user == "nobody" else None)
    assert (said.landlock > 0, said.seccomp) == HAVE
    assert kernel["Seccomp"] == ("2" if said.seccomp else "0")
    assert len(said.missing) == HAVE.count(False)


def test_a_worker_says_whose_it_is() -> None:
    assert confined()[0].user == pwd.getpwuid(os.geteuid()).pw_name


@as_root
def test_a_user_without_a_name_is_a_number() -> None:
    def child() -> str:
        os.setresuid(1 << 30, 1 << 30, 1 << 30)
        return privileges.confine_worker(False, 0).user

    assert in_child(child) == str(1 << 30)


def _limits() -> list[tuple[int, int]]:
    privileges.confine_worker(False, 0)
    kinds = (
        resource.RLIMIT_NOFILE,
        resource.RLIMIT_DATA,
        resource.RLIMIT_CORE,
        resource.RLIMIT_NPROC,
    )
    return [resource.getrlimit(kind) for kind in kinds]


def test_a_worker_has_limits_that_it_cannot_raise() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = min(hard if hard != resource.RLIM_INFINITY else 1 << 30, privileges.MOST_FILES)
    memory = privileges.MOST_MEMORY
    assert in_child(_limits) == [(files, files), (memory, memory), (0, 0), (0, 0)]


def test_a_worker_has_memory_for_its_journals_and_no_end_of_it() -> None:
    def child() -> int:
        privileges.confine_worker(False, 1 << 24)
        with mmap.mmap(-1, 1 << 30):  # shared, as guest memory is
            try:
                bytearray(privileges.MOST_MEMORY + (1 << 26))
            except MemoryError:
                return resource.getrlimit(resource.RLIMIT_DATA)[1]
        return 0

    assert in_child(child) == privileges.MOST_MEMORY + (1 << 26)


def test_a_worker_that_may_not_set_limits_goes_on_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(*_: object) -> None:
        raise ValueError("not allowed to raise maximum limit")  # CPython's word for EPERM

    monkeypatch.setattr(resource, "setrlimit", refused)
    assert "no limits: it may not set them" in confined()[0].missing


def test_a_lower_limit_of_descriptors_is_kept() -> None:
    def child() -> list[tuple[int, int]]:
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
        return _limits()

    assert in_child(child)[0] == (100, 100)


def _own(name: str) -> str:
    with open(f"/proc/self/{name}") as file:
        return file.read()


@pytest.mark.parametrize("user", ["same", pytest.param("nobody", marks=as_root)])
def test_shared_memory_is_in_no_core_file(user: str) -> None:
    def child() -> str:
        with open("/proc/self/coredump_filter", "w") as kinds:
            kinds.write("0x1ff")
        if user == "nobody":
            _become_nobody()
        privileges.confine_worker(False, 0)
        return _own("coredump_filter")

    assert int(in_child(child), 16) == 0x1FF & ~(1 << 1 | 1 << 3 | 1 << 6 | 1 << 8)


@pytest.mark.parametrize("user", ["same", pytest.param("nobody", marks=as_root)])
def test_when_memory_runs_out_a_worker_goes_before_its_master(user: str) -> None:
    def child() -> str:
        if user == "nobody":
            _become_nobody()
        privileges.confine_worker(False, 0)
        return _own("oom_score_adj")

    assert int(in_child(child)) == min(1000, int(_own("oom_score_adj")) + 250)


@as_root
def test_whoever_became_another_user_stays_closed_to_it() -> None:
    def child() -> int:
        _become_nobody()
        privileges.confine_worker(False, 0)
        return prctl(3)

    assert in_child(child) == 0


def test_without_the_sandbox_files_can_be_opened() -> None:
    def child() -> tuple[Privileges, dict[str, str]]:
        return privileges.confine_worker(False, 0), status()

    said, kernel = in_child(child)
    assert (said.landlock, said.seccomp, kernel["Seccomp"]) == (0, False, "0")
    assert said.missing == ["no sandbox: it was switched off"]
    assert (said.no_new_privileges, said.capabilities) == (True, [])


def test_a_worker_without_landlock_goes_on_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(**_: object) -> int:
        raise OSError(errno.ENOSYS, "this kernel has none")

    monkeypatch.setattr(landlock, "restrict_self", none)
    said, kernel = confined()
    assert said.landlock == 0
    assert "no Landlock: this kernel has none" in said.missing
    assert kernel["Seccomp"] == ("2" if HAVE[1] else "0")


def test_a_worker_without_libseccomp_goes_on_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(**_: object) -> int:
        raise OSError(errno.ENOENT, "it is not installed")

    monkeypatch.setattr(seccomp, "restrict_self", none)
    said, kernel = confined()
    assert (said.seccomp, kernel["Seccomp"]) == (False, "0")
    assert "no seccomp: it is not installed" in said.missing
    assert said.landlock > 0 or not HAVE[0]


def test_a_confined_worker_can_say_where_it_went_wrong() -> None:
    def child() -> str:
        privileges.confine_worker(True, 0)
        said: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: said.append(handler.format(record))  # type: ignore[method-assign]
        log = logging.Logger("test")
        log.addHandler(handler)
        try:
            raise ConfigError("it went wrong")
        except ConfigError:
            log.exception("here")
        return said[0]

    said = in_child(child)
    assert said.startswith("here\nTraceback")
    assert said.endswith("ConfigError: it went wrong")


def test_a_gateway_has_the_same_but_sockets() -> None:
    def child() -> tuple[Privileges, bytes]:
        return privileges.confine_gateway(True), loopback()

    said, data = in_child(child)
    assert (said.capabilities, said.no_new_privileges, data) == ([], True, b"over TCP")
    assert (said.landlock > 0, said.seccomp) == HAVE


# The master


def mastered(
    user: str | None = None, *, before: Callable[[], object] | None = None
) -> dict[str, str]:
    """Return what its kernel says of a child that is a master."""

    def child() -> dict[str, str]:
        if before is not None:
            before()
        privileges.confine_master(None if user is None else look_up(user))
        return status()

    result: dict[str, str] = in_child(child)
    return result


#: CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_NET_BIND_SERVICE
_SOCKETS = 1 << 0 | 1 << 1 | 1 << 10


@as_root
def test_a_master_that_stays_root_keeps_what_sockets_take() -> None:
    kernel = mastered()
    assert {kernel[f"Cap{name}"] for name in ("Prm", "Eff", "Bnd")} == {f"{_SOCKETS:016x}"}
    assert (kernel["CapInh"], kernel["CapAmb"]) == ("0" * 16, "0" * 16)


def _after_exec(*program: str) -> dict[str, int]:
    """Return the capabilities of the program that replaces a master, which `program` starts."""
    code = (
        "import os; from vhost_device_console import privileges; privileges.confine_master(None); "
        "os.execvp('cat', ['cat', '/proc/self/status'])"
    )
    command = [*program, sys.executable, "-c", code]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^Cap(\w+):\t(\w+)$", said, re.MULTILINE)
    return {name: int(bits, 16) for name, bits in found}


@as_root
def test_the_program_that_replaces_a_master_has_no_more_capabilities() -> None:
    sets = _after_exec()
    assert sets == {"Inh": 0, "Prm": _SOCKETS, "Eff": _SOCKETS, "Bnd": _SOCKETS, "Amb": 0}


@as_root
@pytest.mark.skipif(not shutil.which("setpriv"), reason="needs setpriv")
def test_what_a_service_gave_its_user_for_sockets_stays() -> None:
    given = (f"--{kind}-caps=+net_bind_service,+net_raw" for kind in ("inh", "ambient"))
    sets = _after_exec("setpriv", "--reuid=nobody", "--clear-groups", *given)
    del sets["Bnd"]
    assert {*sets.values()} == {1 << 10}


def test_a_master_gets_no_new_privileges() -> None:
    assert mastered()["NoNewPrivs"] == "1"


def test_what_a_master_makes_is_its_user_s_alone() -> None:
    assert mastered()["Umask"] == "0077"


@as_root
def test_a_master_becomes_the_user_with_its_groups_and_no_capability() -> None:
    kernel = mastered("nobody")
    groups = os.getgrouplist("nobody", NOBODY.pw_gid)
    assert kernel["Uid"].split() == [str(NOBODY.pw_uid)] * 4
    assert kernel["Gid"].split() == [str(NOBODY.pw_gid)] * 4
    assert sorted(map(int, kernel["Groups"].split())) == sorted(groups)
    assert {kernel[f"Cap{name}"] for name in ("Inh", "Prm", "Eff", "Amb")} == {"0" * 16}


def test_a_daemon_with_a_user_is_nobody_s_to_trace_but_root_s() -> None:
    def child() -> int:
        privileges.confine_master(look_up(str(os.geteuid())))
        return prctl(3)

    assert in_child(child) == 0


@as_root
def test_a_group_that_is_named_is_the_only_one() -> None:
    kernel = mastered("nobody:daemon")
    gid = str(look_up("nobody:daemon").gid)
    assert kernel["Gid"].split() == [gid] * 4
    assert kernel["Groups"].split() == [gid]


@as_root
def test_there_is_no_way_back_to_root() -> None:
    def child() -> None:
        privileges.confine_master(look_up("nobody"))
        os.setuid(0)

    assert in_child(child).errno == errno.EPERM


@as_root
def test_a_master_is_confined_again_after_it_was() -> None:
    def once() -> None:
        privileges.confine_master(look_up("nobody"))

    assert mastered("nobody", before=once)["CapEff"] == "0" * 16


def _refused(work: Callable[[], Any]) -> str:
    def child() -> str:
        try:
            work()
        except ConfigError as error:
            return str(error)
        return "not refused"

    result: str = in_child(child)
    return result


@as_root
def test_who_is_not_root_cannot_become_another() -> None:
    def work() -> None:
        _become_nobody()
        privileges.confine_master(look_up("daemon"))

    said = "--user: cannot become daemon: operation not permitted; start the daemon as root or"
    assert _refused(work).startswith(said)


@as_root
def test_who_is_that_user_already_needs_no_root() -> None:
    kernel = mastered(f"nobody:{NOBODY.pw_gid}", before=_become_nobody)
    assert kernel["Uid"].split() == [str(NOBODY.pw_uid)] * 4


@as_root
@pytest.mark.parametrize(
    ("user", "before", "warned"),
    [(None, None, True), ("root", None, False), ("nobody", None, False), (None, "nobody", False)],
)
def test_a_daemon_that_stays_root_unasked_warns_once(
    user: str | None, before: str | None, warned: bool
) -> None:
    def child() -> list[str]:
        said: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger(privileges.__name__).addHandler(handler)
        if before:
            _become_nobody()
        privileges.confine_master(None if user is None else look_up(user))
        return said

    assert [("--user" in line) for line in in_child(child)] == [True] * warned


# In words


def test_what_is_in_force_is_one_line() -> None:
    assert str(FULL) == (
        "user a, capabilities none, no new privileges, Landlock 7, seccomp, 9 descriptors, 5 MiB"
    )


def test_what_is_missing_is_said() -> None:
    poor = Privileges(
        user="a",
        capabilities=["chown", "net_bind_service"],
        no_new_privileges=False,
        landlock=0,
        seccomp=False,
        files=9,
        memory=None,
        missing=["no Landlock: x", "no seccomp: y"],
    )
    assert str(poor) == (
        "user a, capabilities chown net_bind_service, 9 descriptors, no Landlock: x, no seccomp: y"
    )
