"""One guest of QEMU: what is typed and printed, its ports, and what happens to it in between."""

from __future__ import annotations

import hashlib
import random
from contextlib import ExitStack

import pytest
from console import PROMPT, Console
from qemu import Shared

from launch import WITHIN, receive_until

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]

#: Each test finds the guest at its prompt and leaves it there.


def digest(data: bytes) -> bytes:
    return hashlib.sha256(data).hexdigest().encode()


def written(shared: Shared) -> int:
    """Return how many bytes of output port 0 has had, ever."""
    output: int = shared.daemon.status()[0]["ports"][0]["output"]
    return output


def test_the_guest_takes_the_features_that_the_document_says(console: Console) -> None:
    """docs/offered.md: QEMU passes on what is offered, and Linux knows of RING_RESET there.

    With packed rings: test_packed.py.
    """
    assert console.features() == {0, 1, 28, 29, 32, 35, 40}


# Traffic


@pytest.mark.parametrize("gap", [0, 0.003], ids=["0 ms", "3 ms"])
def test_a_typed_line_arrives_as_typed(console: Console, gap: float) -> None:
    line = b"".join(b"%d-" % number for number in range(200))
    console.send(b"echo 'be''gin'; head -n 1\n")
    console.until(rb"begin\r\n")
    console.type(line + b"\n", gap)
    assert console.until(rb"\r\n") == line, "the echo"
    assert console.until(rb"\r\n") == line, "what head read"
    console.until(PROMPT)


def test_64_kib_of_text_can_be_pasted(console: Console) -> None:
    text = b"".join(b"%063d\n" % number for number in range(1024))
    console.send(b"echo 'be''gin'; cat > f; sha256sum f\n")
    console.until(rb"begin\r\n")
    console.send(text + b"\x04")
    assert console.until(rb"  f\r\n") == text.replace(b"\n", b"\r\n") + digest(text)
    console.until(PROMPT)


def test_5_mib_of_input_arrive_unchanged(console: Console) -> None:
    # Ctrl-O steers the kernel itself where the console is also printk's (hvc_poll).
    data = random.Random(5).randbytes(5 << 20).replace(b"\x0f", b"\x0e")
    console.send(b"stty raw -echo; echo 'be''gin'; head -c %d | sha256sum\n" % len(data))
    console.until(rb"begin\n")
    console.send(data)
    assert console.until(rb"  -\n") == digest(data)
    console.until(PROMPT)


def test_5_mib_of_output_arrive_unchanged(console: Console) -> None:
    console.run(b"dd if=/dev/urandom of=f bs=65536 count=80 2> /dev/null; stty raw")
    expected = console.run(b"sha256sum < f").split()[0]
    console.send(b"echo 'be''gin'; cat f\n")
    console.until(rb"begin\n")
    assert digest(console.take(5 << 20)) == expected
    console.until(PROMPT)


def test_a_guest_that_is_stopped_and_continued_loses_nothing(
    console: Console, shared: Shared
) -> None:
    printed = b"".join(b"%d\n" % number for number in range(1, 500_001))
    typed = b"".join(b"%d;" % number for number in range(20_000))
    console.run(b"seq 500000 > f; stty raw -echo")
    console.send(b"echo 'be''gin'; cat f & head -c %d > g; wait\n" % len(typed))
    console.until(rb"begin\n")
    for part in range(8):
        console.send(typed[len(typed) * part // 8 : len(typed) * (part + 1) // 8])
        shared.guest.ask("stop")
        shared.guest.ask("cont")
        begin, end = (len(printed) * share // 8 for share in (part, part + 1))
        assert console.take(end - begin) == printed[begin:end]
    console.until(PROMPT)
    assert console.run(b"sha256sum < g").split()[0] == digest(typed)


# Resets


def test_a_client_stays_while_the_guest_reboots(console: Console, shared: Shared) -> None:
    before = written(shared)
    console.send(b"reboot -f\n")
    console.until(rb"Linux version")
    console.until(PROMPT)
    assert written(shared) > before


def test_a_client_stays_while_the_machine_is_reset_at_the_prompt(
    console: Console, shared: Shared
) -> None:
    before = written(shared)
    shared.guest.ask("system_reset")
    console.until(rb"Linux version")
    console.until(PROMPT)
    assert written(shared) > before


def test_a_client_stays_while_the_machine_is_reset_as_it_prints(
    console: Console, shared: Shared
) -> None:
    console.send(b"yes the one before\n")
    console.until(rb"(the one before\r\n){9}")
    shared.guest.ask("system_reset")
    console.until(rb"Linux version")
    console.until(PROMPT)
    console.run(b"true")


def test_the_console_goes_on_after_suspend_to_ram(console: Console, shared: Shared) -> None:
    console.send(b"echo mem > /sys/power/state; echo 'awa''ke'\n")
    shared.guest.expect_event("SUSPEND")
    shared.guest.ask("system_wakeup")
    console.until(rb"awake")  # the kernel may say something behind it
    console.until(PROMPT)
    console.run(b"true")


# Ports


def test_the_guest_knows_each_port_by_its_name(console: Console) -> None:
    names = console.run(b"cat /sys/class/virtio-ports/*/name").split()
    assert sorted(names) == [b"console0", b"data", b"org.qemu.guest_agent.0", b"second"]


def test_each_port_carries_its_own_bytes(console: Console, shared: Shared) -> None:
    ports = ("data", "org.qemu.guest_agent.0")
    with ExitStack() as ends:
        people = [ends.enter_context(shared.attach(port)) for port in ports]
        for port in ports:
            answer = f'exec 3<>/dev/virtio-ports/{port}; read line <&3; echo "{port}: $line" >&3'
            console.run(f"{{ ({answer}) & }}".encode())
        for person, port in zip(people, ports, strict=True):
            person.sendall(b"sent to %s\n" % port.encode())
        for person, port in zip(people, ports, strict=True):
            assert receive_until(person, b"\n") == f"{port}: sent to {port}\n".encode()
    console.run(b"wait")


def test_a_second_console_has_a_login_of_its_own(console: Console, shared: Shared) -> None:
    console.run(b"{ (setsid getty -n -l /bin/sh 0 hvc1; true) & }")
    with shared.attach("second") as peer:
        person = Console(peer.fileno())
        person.until(rb"# ")
        person.send(b"tty; exit\n")
        person.until(rb"\n/dev/hvc1\r\n")
    console.run(b"wait")


def test_5_mib_come_in_through_a_generic_port_unchanged(console: Console, shared: Shared) -> None:
    data = random.Random(6).randbytes(5 << 20)
    console.send(b"head -c %d /dev/virtio-ports/data | sha256sum\n" % len(data))
    with shared.attach("data") as person:
        person.settimeout(WITHIN)
        person.sendall(data)
        assert digest(data) in console.until(rb"  -\r\n")
    console.until(PROMPT)


def test_5_mib_go_out_through_a_generic_port_unchanged(console: Console, shared: Shared) -> None:
    console.run(b"dd if=/dev/urandom of=f bs=65536 count=80 2> /dev/null")
    expected = console.run(b"sha256sum < f").split()[0]
    with shared.attach("data") as peer:
        person = Console(peer.fileno())
        console.send(b"cat f > /dev/virtio-ports/data\n")
        assert digest(person.take(5 << 20)) == expected
    console.until(PROMPT)


def test_a_new_size_reaches_the_guest(console: Console, shared: Shared) -> None:
    for size in ("132x43", "80x24"):
        shared.command("resize", shared.name, size)
        columns, rows = size.split("x")
        console.run(f'until [ "$(stty size)" = "{rows} {columns}" ]; do :; done'.encode())


def test_a_console_that_is_not_the_first_has_its_own_size(console: Console, shared: Shared) -> None:
    shared.command("resize", f"{shared.name}:second", "100x30")
    console.run(b'until [ "$(stty size < /dev/hvc1)" = "30 100" ]; do :; done')


def test_a_port_comes_and_goes_while_the_guest_runs(console: Console, shared: Shared) -> None:
    for _ in range(2):
        shared.add("later")
        link = b"/dev/virtio-ports/later"
        console.run(b"until [ -e %s ]; do usleep 1000; done" % link)
        with shared.attach("later") as person:
            console.run(b"{ (exec 3<>%s; head -n 1 <&3 >&3) & }" % link)
            person.sendall(b"there and back\n")
            assert receive_until(person, b"\n") == b"there and back\n"
        console.run(b"wait")
        shared.command("port", "remove", shared.name, "later")
        console.run(b"while grep -qx later /sys/class/virtio-ports/*/name; do usleep 1000; done")


def test_a_port_can_be_removed_while_a_process_reads_it(console: Console, shared: Shared) -> None:
    shared.add("gone")
    console.run(b"until [ -e /dev/virtio-ports/gone ]; do usleep 1000; done")
    with shared.attach("gone") as person:
        person.sendall(b"one\n")
        console.send(b"cat /dev/virtio-ports/gone\n")
        console.until(rb"\none\r\n")
        shared.command("port", "remove", shared.name, "gone")
        console.until(PROMPT)
        assert person.recv(1) == b""


def test_a_generic_port_without_anybody_holds_the_guests_output(
    console: Console, shared: Shared
) -> None:
    console.run(b"{ (echo for somebody > /dev/virtio-ports/data; touch written) & }")
    assert console.run(b"ls").find(b"written") == -1
    with shared.attach("data") as person:
        assert receive_until(person, b"\n") == b"for somebody\n"
    console.run(b"wait; rm written")
