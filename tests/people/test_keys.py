"""Who is let in to what: lines of authorized keys, rules of an access file, and both changing."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import asyncssh
import pytest
from vhost_device_console.errors import ConfigError
from vhost_device_console.people.keys import Keys, Line, Person, Proof, Role, parse_access

KEY = asyncssh.generate_private_key("ssh-ed25519").convert_to_public()
OTHER = asyncssh.generate_private_key("ssh-ed25519").convert_to_public()
PUBLIC = KEY.export_public_key().decode().strip()
NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)

Admit = Callable[..., Person | None]


def person(told: object) -> Person | None:
    if told is None:
        return None
    assert isinstance(told, dict)
    found = told["person"]
    assert isinstance(found, Person)
    return found


def admit(
    line: str,
    key: asyncssh.SSHKey = KEY,
    address: str = "192.0.2.1",
    principals: tuple[str, ...] | None = None,
) -> Person | None:
    proof = Proof(key, "", address, principals)
    return person(Line(line).admit(proof, NOW, accounts=False))


@pytest.fixture
def keys(folder: Path) -> Callable[..., Keys]:
    def make(line: str = f"{PUBLIC} ann@laptop", access: str | None = None) -> Keys:
        (folder / "keys").write_text(line + "\n")
        if access is None:
            return Keys(str(folder / "keys"), None)
        (folder / "access").write_text(access)
        return Keys(str(folder / "keys"), str(folder / "access"))

    return make


def come(keys: Keys, key: asyncssh.SSHKey = KEY, principals: list[str] | None = None) -> Person:
    found = person(keys.validate(key, "", "192.0.2.1", principals, ca=principals is not None))
    assert found is not None
    return found


# Lines


def test_a_key_comes_in_under_its_comment_and_another_does_not() -> None:
    found = admit(f"{PUBLIC} ann@laptop")
    assert found is not None
    assert (found.name, found.role, found.guests) == ("ann@laptop", Role.WRITER, None)
    assert found.marks == {"ann@laptop", KEY.get_fingerprint()}
    assert admit(f"{PUBLIC} ann@laptop", OTHER) is None


def test_a_key_without_a_comment_is_called_by_its_fingerprint() -> None:
    found = admit(PUBLIC)
    assert found is not None
    assert found.name == KEY.get_fingerprint()


def test_a_line_may_limit_guests_and_role() -> None:
    found = admit(f'guests="vm*,db:log",role=watch {PUBLIC}')
    assert found is not None
    assert (found.guests, found.role) == (("vm*", "db:log"), Role.WATCH)


@pytest.mark.parametrize(
    ("address", "let_in"), [("192.0.2.9", True), ("198.51.100.1", False), ("", False)]
)
def test_from_limits_where_from(address: str, let_in: bool) -> None:
    assert (admit(f'from="192.0.2.0/24" {PUBLIC}', address=address) is not None) is let_in


@pytest.mark.parametrize(
    ("until", "let_in"),
    [
        ("20261124", True),
        ("20261122", False),
        ("202611231200Z", False),
        ("202611231201Z", True),
        ("20261123115959Z", False),
    ],
)
def test_expiry_time_ends_it(until: str, let_in: bool) -> None:
    assert (admit(f'expiry-time="{until}" {PUBLIC}') is not None) is let_in


@pytest.mark.parametrize(
    ("options", "no_pty"),
    [("no-pty ", True), ("restrict ", True), ("restrict,pty ", False), ("", False)],
)
def test_a_terminal_can_be_refused(options: str, no_pty: bool) -> None:
    told = Line(options + PUBLIC).admit(Proof(KEY, "", "", None), NOW, accounts=False)
    assert told is not None
    assert bool(told.get("no-pty")) is no_pty


def test_a_command_that_a_key_is_for_is_told() -> None:
    told = Line(f'command="echo \\"a b\\"" {PUBLIC}').admit(
        Proof(KEY, "", "", None), NOW, accounts=False
    )
    assert told is not None
    assert told["command"] == 'echo "a b"'


def test_options_that_change_nothing_here_are_passed_over() -> None:
    options = 'environment="A=b",permitopen="host:22",no-X11-forwarding,no-port-forwarding'
    assert admit(f"{options} {PUBLIC}") is not None


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ("nonsense", "there is no key in it"),
        ("verify-required ", "the option verify-required means nothing here"),
        ("rol=watch ", "the option rol means nothing here"),
        ("role=root ", "'root' is no role: say writer or watch"),
        ("role=watch,role=writer ", "an option stands there twice"),
        ('expiry-time="tomorrow" ', "'tomorrow' is no time"),
        ('guests="vm3 ', "a quote in it does not end"),
    ],
)
def test_a_line_that_is_not_understood_lets_nobody_in_and_says_why(options: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Line(options + PUBLIC)


def test_such_a_line_is_logged_and_the_others_count(
    keys: Callable[..., Keys], caplog: pytest.LogCaptureFixture
) -> None:
    come(keys(f"# who\n\nverify-required {PUBLIC}\n{PUBLIC} ann"))
    assert "keys: line 3 is not used: the option verify-required means" in caplog.text


# Certificates


def test_an_authority_s_key_is_no_user_s() -> None:
    assert admit(f"cert-authority {PUBLIC}") is None
    assert admit(PUBLIC, principals=("ann",)) is None


def test_a_certificate_comes_in_by_its_principals() -> None:
    line = f'cert-authority,principals="ann,op-*" {PUBLIC}'
    found = admit(line, principals=("op-night",))
    assert found is not None
    assert (found.name, found.marks) == ("op-night", frozenset())
    assert admit(line, principals=("bob",)) is None


def test_a_certificate_without_principals_is_not_everybody_s() -> None:
    assert admit(f"cert-authority {PUBLIC}", principals=()) is None


def test_where_nothing_maps_principals_they_are_guests(keys: Callable[..., Keys]) -> None:
    made = keys(f"cert-authority {PUBLIC}")
    found = come(made, principals=["vm3", "*"])
    assert made.role(found, ["vm3", "vm3:0"]) is Role.WRITER
    assert made.role(found, ["vm4", "vm4:0"]) is None
    assert made.role(found, ["*"]) is Role.WRITER


# The access file


def test_without_an_access_file_a_key_reaches_every_guest(keys: Callable[..., Keys]) -> None:
    made = keys()
    assert made.role(come(made), ["vm3"]) is Role.WRITER


def test_with_one_nobody_reaches_anything_that_it_does_not_name(
    keys: Callable[..., Keys],
) -> None:
    made = keys(access="")
    assert made.role(come(made), ["vm3"]) is None


@pytest.mark.parametrize(
    "mark", ["ann@laptop", KEY.get_fingerprint()], ids=["comment", "fingerprint"]
)
def test_a_rule_knows_a_key_by_comment_or_fingerprint(keys: Callable[..., Keys], mark: str) -> None:
    made = keys(access=f'[[allow]]\nkeys = ["{mark}"]\nguests = ["vm?"]\n')
    found = come(made)
    assert made.role(found, ["vm3", "vm3:0", "vm3:login"]) is Role.WRITER
    assert made.role(found, ["vm33", "vm33:0"]) is None


def test_a_rule_can_name_one_port(keys: Callable[..., Keys]) -> None:
    made = keys(access='[[allow]]\nkeys = ["ann@laptop"]\nguests = ["vm3:log"]\n')
    found = come(made)
    assert made.role(found, ["vm3", "vm3:1", "vm3:log"]) is Role.WRITER
    assert made.role(found, ["vm3", "vm3:0", "vm3:"]) is None


WATCH_ALL_WRITE_SOME = """
[[allow]]
principals = ["ops"]
guests = ["*"]
role = "watch"

[[allow]]
principals = ["ops"]
guests = ["test-*"]
"""


def test_of_several_rules_the_widest_counts(keys: Callable[..., Keys]) -> None:
    made = keys(f"cert-authority {PUBLIC}", WATCH_ALL_WRITE_SOME)
    found = come(made, principals=["ops"])
    assert made.role(found, ["vm3"]) is Role.WATCH
    assert made.role(found, ["test-1"]) is Role.WRITER


def test_a_line_s_own_limits_hold_beside_the_rules(keys: Callable[..., Keys]) -> None:
    rule = '[[allow]]\nkeys = ["ann"]\nguests = ["*"]\n'
    made = keys(f'guests="vm*",role="watch" {PUBLIC} ann', rule)
    found = come(made)
    assert made.role(found, ["vm3"]) is Role.WATCH
    assert made.role(found, ["db"]) is None


def test_a_principal_is_no_key_s_comment(keys: Callable[..., Keys]) -> None:
    made = keys(f"cert-authority {PUBLIC}", '[[allow]]\nkeys = ["ann"]\nguests = ["*"]\n')
    assert made.role(come(made, principals=["ann"]), ["vm3"]) is None


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("allow = 1", "allow"),
        ("[[allow]]\nguests = []", "guests|length"),
        ("[[allow]]\nguests = ['*']\nrole = 'root'", "root"),
        ("[[allow]]\nguests = ['*']\nusers = ['ann']", "users"),
        ("nonsense", "access"),
    ],
)
def test_an_access_file_that_makes_no_sense_is_refused_in_a_line(text: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what) as raised:
        parse_access(text.encode(), "access")
    assert "\n" not in str(raised.value)


# Both change


def test_a_changed_file_counts_at_once(keys: Callable[..., Keys], folder: Path) -> None:
    made = keys()
    found = come(made)
    assert made.again(found)
    (folder / "keys").write_text("# nobody any more\n")
    assert made.validate(KEY, "", "192.0.2.1") is None
    assert not made.again(found)


def test_a_key_with_other_limits_is_not_as_before(keys: Callable[..., Keys], folder: Path) -> None:
    made = keys()
    found = come(made)
    (folder / "keys").write_text(f"role=watch {PUBLIC} ann@laptop\n")
    assert not made.again(found)


@pytest.mark.parametrize("name", ["keys", "access"])
def test_a_file_that_is_gone_lets_nobody_in_until_it_is_back(
    keys: Callable[..., Keys], folder: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    made = keys(access='[[allow]]\nkeys = ["ann@laptop"]\nguests = ["*"]\n')
    found = come(made)

    def reaches() -> bool:
        told = made.validate(KEY, "", "192.0.2.1")
        return told is not None and made.role(found, ["vm3"]) is not None

    assert reaches()
    (folder / name).rename(folder / "aside")
    with caplog.at_level(logging.ERROR):
        assert not reaches()
    assert "nobody is let in: cannot read" in caplog.text
    (folder / "aside").rename(folder / name)
    assert reaches()


def test_a_file_that_was_never_there_is_an_error(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*/none: no such file"):
        Keys(str(folder / "none"), None)


def test_an_expired_line_counts_from_its_moment_on() -> None:
    moment = datetime.now().astimezone() + timedelta(hours=1)
    line = Line(f'expiry-time="{moment:%Y%m%d%H%M%S}" {PUBLIC}')
    proof = Proof(KEY, "", "", None)
    assert line.admit(proof, datetime.now(UTC), accounts=False) is not None
    assert line.admit(proof, moment, accounts=False) is None
