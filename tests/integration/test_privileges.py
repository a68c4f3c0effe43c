"""What the workers of real daemons may do while they serve."""

from __future__ import annotations

import os
import platform
import pwd
import signal
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from scene import Pair, attach, boot, converse
from vhost_device_console import seccomp
from vhost_device_console.kernel import system_call

from conftest import StartDaemon
from launch import Daemon, command

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

NOBODY = pwd.getpwnam("nobody")


def _has_library() -> bool:
    try:
        seccomp.library()
    except OSError:
        return False
    return True


filtered = pytest.mark.skipif(not _has_library(), reason="needs libseccomp")

#: kcmp(2), which tells whether two descriptors are one open file.
_KCMP = {"x86_64": 312, "aarch64": 272}.get(platform.machine(), 0)


def kernel_says(pid: int) -> dict[str, str]:
    with open(f"/proc/{pid}/status") as file:
        return {key: value.strip() for key, _, value in (line.partition(":") for line in file)}


def privileges_of(daemon: Daemon, guest: int = 0) -> dict[str, Any]:
    said: dict[str, Any] = daemon.until(
        lambda guests: guests[guest]["privileges"] is not None, "it never said"
    )[guest]["privileges"]
    return said


def check_serves(daemon: Daemon) -> None:
    with boot(daemon) as console, attach(daemon) as peer:
        converse(console, peer)


# By default


def test_the_status_says_what_the_kernel_does(pair: Pair) -> None:
    said, kernel = privileges_of(pair.daemon), kernel_says(pair.worker)
    assert (said["capabilities"], int(kernel["CapEff"], 16)) == ([], 0)
    assert (said["no_new_privileges"], kernel["NoNewPrivs"]) == (True, "1")
    assert kernel["Seccomp"] == ("2" if said["seccomp"] else "0")
    uid = pwd.getpwnam(said["user"]).pw_uid
    assert kernel["Uid"].split() == [str(uid)] * 4
    limits = [
        psutil.Process(pair.worker).rlimit(kind)[1]
        for kind in (psutil.RLIMIT_NOFILE, psutil.RLIMIT_DATA)
    ]
    assert [said["files"], said["memory"]] == limits


@filtered
def test_a_worker_is_filtered_while_it_serves(pair: Pair) -> None:
    with boot(pair.daemon) as console, attach(pair.daemon) as peer:
        converse(console, peer)
        assert kernel_says(pair.worker)["Seccomp"] == "2"


def test_the_master_gets_no_new_privileges_either(pair: Pair) -> None:
    assert kernel_says(pair.daemon.pid)["NoNewPrivs"] == "1"


def test_a_guest_s_status_has_it_in_words(pair: Pair) -> None:
    said = command(pair.daemon.folder, "status", "c.sock0").stdout.splitlines()
    assert said[-1].startswith("c.sock0 is served with: user ")
    assert "no new privileges" in said[-1]


def same_file(first: tuple[int, int], second: tuple[int, int]) -> bool:
    """Say whether two (process, descriptor) are one open file (kcmp(2), KCMP_FILE)."""
    (pid, fd), (other, other_fd) = first, second
    return system_call(_KCMP, pid, other, 0, fd, other_fd) == 0


@pytest.mark.skipif(not _KCMP, reason="kcmp has another number here")
def test_two_workers_share_no_open_file_but_the_log(pair: Pair) -> None:
    first, second = pair.daemon.workers()
    with boot(pair.daemon) as console, attach(pair.daemon) as peer:
        converse(console, peer)
        shared = {
            (fd, other)
            for fd in map(int, os.listdir(f"/proc/{first}/fd"))
            for other in map(int, os.listdir(f"/proc/{second}/fd"))
            if same_file((first, fd), (second, other))
        }
    assert shared == {(2, 2)}


def test_a_worker_holds_nothing_of_the_terminal_but_the_log(pair: Pair) -> None:
    names = [os.readlink(f"/proc/{pair.worker}/fd/{fd}") for fd in (0, 1)]
    assert names == ["/dev/null"] * 2


# From inside

PRELUDE = """
import errno, functools, os, signal, socket, sys
from vhost_device_console import cli, landlock, master, privileges, worker

def attempt(): ...

def run(guest, heirlooms):
    first = guest.socket_path + ".first"
    try:
        os.close(os.open(first, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return worker.run(guest, heirlooms)
    confine = privileges.confine_worker

    def confine_and_attempt(*arguments):
        said = confine(*arguments)
        try:
            attempt()
            what = "allowed"
        except OSError as error:
            what = errno.errorcode[error.errno]
        os.write(2, f"attempt: {what}\\n".encode())
        return said

    privileges.confine_worker = confine_and_attempt
    return worker.run(guest, heirlooms)

master.serve = functools.partial(master.serve, run=run)
"""


def attempting(work: str) -> list[str]:
    code = PRELUDE.replace("def attempt(): ...", f"def attempt():\n    {work}")
    return [sys.executable, "-c", f"{code}\ncli.main()"]


@filtered
@pytest.mark.parametrize(
    "work",
    [
        "os.open('/etc/passwd', os.O_RDONLY)",
        "os.open('/tmp/x', os.O_WRONLY | os.O_CREAT)",
        "os.listdir('/proc')",
        "os.kill(os.getppid(), signal.SIGTERM)",
        "os.sched_setaffinity(os.getppid(), {0})",
    ],
)
def test_inside_a_worker_it_is_refused(daemon: StartDaemon, work: str) -> None:
    served = daemon("unix", program=attempting(work))
    assert served.expect_log(r"attempt: (\w+)")[1] == "EPERM"
    check_serves(served)
    os.unlink(f"{served.sockets[0]}.first")


@filtered
@pytest.mark.parametrize(
    "work",
    [
        "socket.socket(socket.AF_UNIX)",
        "socket.socket()",
        "os.execv('/bin/sh', ['sh'])",
        "os.fork()",
        "os.setuid(0)",
    ],
)
def test_inside_a_worker_it_is_the_worker_s_end(daemon: StartDaemon, work: str) -> None:
    served = daemon("unix", program=attempting(work))
    served.expect_log(r"its worker died: SIGSYS \(a system call that no worker makes")
    check_serves(served)
    os.unlink(f"{served.sockets[0]}.first")


# Less of it


def test_without_the_sandbox_the_status_says_so(daemon: StartDaemon) -> None:
    served = daemon("unix", 1, "--no-sandbox")
    said = privileges_of(served)
    assert (said["landlock"], said["seccomp"]) == (0, False)
    assert said["missing"] == ["no sandbox: it was switched off"]
    assert kernel_says(served.workers()[0])["Seccomp"] == "0"


def test_on_a_kernel_without_landlock_it_serves_and_says_so(daemon: StartDaemon) -> None:
    code = """
import errno, os
from vhost_device_console import cli, landlock

def none(*_, **__):
    raise OSError(errno.ENOSYS, "this kernel has none")

landlock.restrict_self = none
cli.main()
"""
    served = daemon("unix", program=[sys.executable, "-c", code])
    check_serves(served)
    assert "no Landlock: this kernel has none" in privileges_of(served)["missing"]
    table = command(served.folder, "status").stdout
    assert "no Landlock" in table


# As another user


def give(folder: Path) -> None:
    """Give `folder`, and what is for sockets in it, to nobody."""
    (folder / "run").mkdir(mode=0o700)
    for path in (folder, folder / "run"):
        os.chown(path, NOBODY.pw_uid, NOBODY.pw_gid)


def uids(pid: int) -> set[int]:
    return {*map(int, kernel_says(pid)["Uid"].split())}


@as_root
def test_a_daemon_of_root_s_becomes_the_user_with_all_its_workers(
    daemon: StartDaemon, folder: Path
) -> None:
    give(folder)
    served = daemon("unix", 2, "--user", "nobody")
    everybody = [served.pid, *served.workers()]
    assert {uid for pid in everybody for uid in uids(pid)} == {NOBODY.pw_uid}
    assert {int(kernel_says(pid)["CapPrm"], 16) for pid in everybody} == {0}
    assert privileges_of(served)["user"] == "nobody"
    check_serves(served)


@as_root
def test_a_successor_is_the_user_s_too(daemon: StartDaemon, folder: Path) -> None:
    give(folder)
    served = daemon("unix", 1, "--user", "nobody")
    (first,) = served.workers()
    os.kill(first, signal.SIGKILL)
    served.until(lambda guests: guests[0]["restarts"] == 1, "no successor")
    (second,) = served.workers()
    assert uids(second) == {NOBODY.pw_uid}
    check_serves(served)


@as_root
def test_ports_come_while_it_runs_as_another_user(daemon: StartDaemon, folder: Path) -> None:
    give(folder)
    served = daemon("unix", 1, "--user", "nobody", "--max-ports", "3")
    for backend in (f"unix,path={folder}/more", "pty"):
        added = command(folder, "port", "add", "c.sock0", f"name={backend[:3]},backend={backend}")
        assert (added.returncode, added.stderr) == (0, "")
    assert os.stat(folder / "more").st_uid == NOBODY.pw_uid
    check_serves(served)


@as_root
def test_its_sockets_and_ptys_are_the_user_s(daemon: StartDaemon, folder: Path) -> None:
    give(folder)
    served = daemon("unix", 1, "--user", "nobody", "--port", "name=p,backend=pty")
    pty = served.status()[0]["ports"][1]["endpoint"]
    paths = [*served.sockets, *served.data, served.monitor, pty]
    assert {os.stat(path).st_uid for path in paths} == {NOBODY.pw_uid}


@as_root
def test_a_daemon_that_is_not_root_s_is_confined_as_well(daemon: StartDaemon, folder: Path) -> None:
    give(folder)
    # Not before Python has all that it needs: it may lie where only root can read.
    code = f"""
import os, psutil
from vhost_device_console import cli, master

def serve(daemon, serve=master.serve):
    os.setgroups([])
    os.setresgid({NOBODY.pw_gid}, {NOBODY.pw_gid}, {NOBODY.pw_gid})
    os.setresuid({NOBODY.pw_uid}, {NOBODY.pw_uid}, {NOBODY.pw_uid})
    return serve(daemon)

master.serve = serve
cli.main()
"""
    served = daemon("unix", program=[sys.executable, "-c", code])
    check_serves(served)
    said = privileges_of(served)
    assert (said["user"], said["capabilities"], said["no_new_privileges"]) == ("nobody", [], True)
    assert said["seccomp"] == _has_library()


@as_root
def test_a_daemon_of_root_s_that_stays_it_says_so_once(daemon: StartDaemon) -> None:
    served = daemon("unix", 2)
    served.expect_log("it runs as root, where another user would do: name one with --user")
    assert uids(served.workers()[0]) == {0}


@as_root
def test_a_user_that_cannot_be_had_any_more_is_not_reloaded(
    daemon: StartDaemon, folder: Path
) -> None:
    described = f"""
[[guest]]
socket = "{folder}/c.sock0"
[[guest.port]]
name = "p"
console = true
backend = "unix"
path = "{folder}/c.sock0.data"
"""
    file = folder / "c.toml"
    file.write_text(described)
    served = daemon(None, 1, "--config", str(file), socket_path=None)
    (worker,) = served.workers()
    file.write_text(f'user = "nobody"\n{described}')
    served.signal(signal.SIGHUP)
    served.expect_log("cannot become nobody: operation not permitted")
    served.expect_log("nothing is reloaded")
    assert served.workers() == [worker]


def test_a_user_that_there_is_not_is_one_line(folder: Path) -> None:
    said = command(folder, "-s", f"{folder}/c", "-b", "pty", "--user", "nobody-at-all")
    assert said.returncode == 2
    assert said.stderr.count("\n") == 1
    assert "there is no user 'nobody-at-all' on this machine" in said.stderr
    assert not [path for path in folder.iterdir() if path.name != "run"]
