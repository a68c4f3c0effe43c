"""What Prometheus is told, and that the dashboard, the alerts and the document go by it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from msgspec.structs import replace
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from vhost_device_console import monitor
from vhost_device_console.errors import ConfigError, ConsoleError
from vhost_device_console.monitor import GuestStatus, PortStatus, Services, Status
from vhost_device_console.people import metrics
from vhost_device_console.supervision import State

import launch

ROOT = Path(__file__).parents[2]
PREFIX = "vhost_device_console_"

#: Every number is another one, so that none can stand in for another.
PORT = PortStatus(
    id=1,
    name="agent",
    endpoint="/a",
    console=False,
    overflow="block",
    state="ready",
    open=True,
    host_open=True,
    held=True,
    readers=101,
    output=102,
    input=103,
    missed=104,
    discarded=105,
    stalls=106,
    columns=0,
    rows=0,
    size_by="",
    log="/l",
    log_failing=True,
    lag=107,
)
GUEST = GuestStatus(
    name="shop",
    socket="/s0",
    state="running",
    daemon=11,
    worker=12,
    frontend=13,
    uptime=14.0,
    restarts=15,
    rss=16,
    cpu=17.0,
    sessions=18,
    kicks=19,
    calls=20,
    chains=21,
    refused=22,
    broken=23,
    ignored=24,
    max_ports=25,
    ports=[PORT],
    cpu_seconds=26.5,
    services=Services(bounds=[4.096e-06, 8.192e-06], counts=[3, 4, 5], seconds=0.25),
)

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


class Given(Collector):
    """Always the same metrics."""

    def __init__(self, answers: Sequence[tuple[str, Status]], silent: int) -> None:
        self._given = answers, silent

    def collect(self) -> Iterator[Metric]:
        return metrics.exposition(*self._given)


def text(*answers: tuple[str, Status], silent: int = 0) -> str:
    registry = CollectorRegistry()
    registry.register(Given(answers, silent))
    return generate_latest(registry).decode()


def parse(exposed: str) -> Samples:
    """Return the samples by their names and labels; fail if two have the same."""
    found: Samples = {}
    for family in text_string_to_metric_families(exposed):
        for sample in family.samples:
            key = sample.name.removeprefix(PREFIX), frozenset(sample.labels.items())
            assert key not in found
            found[key] = sample.value
    return found


def of(*guests: GuestStatus, daemon: str = "") -> tuple[str, Status]:
    return daemon, Status(version="1.2", guests=[*guests])


def sample(samples: Samples, name: str, **labels: str) -> float | None:
    """Return the sample of a guest, or of a port if one is named, with these other labels."""
    wanted = {"daemon": "", "guest": "shop", **labels}
    return samples.get((name, frozenset(wanted.items())))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sessions_total", 18),
        ("kicks_total", 19),
        ("interrupts_total", 20),
        ("chains_total", 21),
        ("refused_total", 22),
        ("broken_queues_total", 23),
        ("ignored_control_messages_total", 24),
        ("worker_restarts_total", 15),
        ("worker_cpu_seconds_total", 26.5),
        ("worker_resident_memory_bytes", 16),
        ("frontend_connected", 1),
    ],
)
def test_a_guest_s_metric_is_what_its_status_says(name: str, value: float) -> None:
    assert sample(parse(text(of(GUEST))), name) == value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port_readers", 101),
        ("port_output_bytes_total", 102),
        ("port_input_bytes_total", 103),
        ("port_missed_bytes_total", 104),
        ("port_discarded_bytes_total", 105),
        ("port_stalls_total", 106),
        ("port_reader_lag_bytes", 107),
        ("port_open", 1),
        ("port_held", 1),
        ("port_failed", 0),
        ("port_log_failing", 1),
    ],
)
def test_a_port_s_metric_is_what_its_status_says(name: str, value: float) -> None:
    assert sample(parse(text(of(GUEST))), name, port="agent") == value


@pytest.mark.parametrize("state", State)
def test_a_guest_is_in_one_state(state: State) -> None:
    samples = parse(text(of(replace(GUEST, state=state))))
    states = {each: sample(samples, "guest_state", state=each) for each in State}
    assert states == {each: each == state for each in State}


def test_the_histogram_counts_all_that_took_no_longer_than_each_bound() -> None:
    samples = parse(text(of(GUEST)))
    bounds = ("4.096e-06", "8.192e-06", "+Inf")
    assert [sample(samples, "service_seconds_bucket", le=bound) for bound in bounds] == [3, 7, 12]
    assert sample(samples, "service_seconds_count") == 12
    assert sample(samples, "service_seconds_sum") == 0.25


def test_a_guest_without_a_worker_or_a_frontend_has_no_memory_but_its_counters() -> None:
    guest = replace(GUEST, worker=None, rss=None, cpu=None, uptime=None, frontend=None)
    samples = parse(text(of(guest)))
    assert sample(samples, "worker_resident_memory_bytes") is None
    assert sample(samples, "worker_cpu_seconds_total") == 26.5
    assert sample(samples, "frontend_connected") == 0


def test_a_frontend_that_is_not_known_is_connected_all_the_same() -> None:
    samples = parse(text(of(replace(GUEST, frontend=0))))
    assert sample(samples, "frontend_connected") == 1


def test_a_port_that_the_guest_could_not_add_has_failed() -> None:
    guest = replace(GUEST, ports=[replace(PORT, state="failed")])
    assert sample(parse(text(of(guest))), "port_failed", port="agent") == 1


def test_a_port_without_a_log_has_none_that_fails() -> None:
    guest = replace(GUEST, ports=[replace(PORT, log=None, log_failing=False)])
    assert sample(parse(text(of(guest))), "port_log_failing", port="agent") is None


def test_what_an_older_daemon_does_not_say_is_left_out() -> None:
    samples = parse(text(of(replace(GUEST, services=None, cpu_seconds=None))))
    assert sample(samples, "service_seconds_count") is None
    assert sample(samples, "worker_cpu_seconds_total") is None
    assert sample(samples, "kicks_total") == 19


def test_daemons_are_counted_and_each_version_is_told_once() -> None:
    samples = parse(text(of(), of(daemon="web"), silent=3))
    assert samples["daemons", frozenset({("state", "answering")})] == 2
    assert samples["daemons", frozenset({("state", "silent")})] == 3
    assert samples["build_info", frozenset({("version", "1.2")})] == 1


def test_guests_of_the_same_name_are_told_apart_by_their_daemons() -> None:
    samples = parse(text(of(GUEST, daemon="web"), of(replace(GUEST, kicks=1), daemon="mail")))
    assert sample(samples, "kicks_total", daemon="web") == 19
    assert sample(samples, "kicks_total", daemon="mail") == 1


def test_guests_of_the_same_name_are_told_apart_though_their_daemons_are_not() -> None:
    samples = parse(text(of(GUEST), of(replace(GUEST, kicks=1, daemon=5))))
    assert sample(samples, "kicks_total", guest="shop of process 11") == 19
    assert sample(samples, "kicks_total", guest="shop of process 5") == 1


@pytest.mark.parametrize("name", ['a"b', "a\\nb", "a\nb", "ü", "} 1\n# TYPE x"])
def test_no_name_can_pretend_to_be_more_than_a_name(name: str) -> None:
    exposed = text(of(replace(GUEST, name=name)))
    assert sample(parse(exposed), "kicks_total", guest=name) == 19
    assert len(exposed.splitlines()) == len(text(of(GUEST)).splitlines())


def test_the_label_of_a_daemon_is_its_folder_s_below_the_usual_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(folder))
    asked = {f"{folder}/1.sock": of(GUEST)[1], f"{folder}/web/2.sock": of(GUEST)[1]}
    monkeypatch.setattr(monitor, "ask", asked.__getitem__)
    registry = CollectorRegistry()
    registry.register(metrics.Daemons(lambda: [*asked]))
    samples = parse(generate_latest(registry).decode())
    assert sample(samples, "kicks_total") == sample(samples, "kicks_total", daemon="web") == 19


def test_a_daemon_that_does_not_answer_is_counted_and_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def ask(path: str) -> Status:
        raise ConsoleError(f"the daemon at {path} does not answer")

    monkeypatch.setattr(monitor, "ask", ask)
    registry = CollectorRegistry()
    registry.register(metrics.Daemons(lambda: ["/x"]))
    for _ in range(2):
        samples = parse(generate_latest(registry).decode())
        assert samples["daemons", frozenset({("state", "silent")})] == 1
    assert caplog.messages == ["the daemon at /x does not answer"]


@pytest.mark.parametrize(
    "where", ["", "9417", "127.0.0.1", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:70000"]
)
def test_a_place_to_listen_that_makes_no_sense_is_refused(where: str) -> None:
    with pytest.raises(ConfigError, match=r"give HOST:PORT, such as .*, or unix:PATH"):
        metrics.serve(list, where, print, remote=False)


@pytest.mark.parametrize("where", ["0.0.0.0:0", "[::]:0", "192.0.2.1:9417"])
def test_only_the_loopback_is_listened_at_unless_told_otherwise(where: str) -> None:
    with pytest.raises(ConfigError, match="add --allow-remote if they may"):
        metrics.serve(list, where, print, remote=False)


def test_what_is_not_installed_is_said_in_a_line(folder: Path) -> None:
    """Without prometheus_client the command says what to install, and the others work."""
    program = (
        "import sys; sys.modules['prometheus_client'] = None; "
        "from vhost_device_console import cli; cli.main()"
    )
    done = launch.run([sys.executable, "-c", program, "metrics", "--once"], folder)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "vhost-device-console: error: prometheus_client is not installed: "
        "pip install 'vhost-device-console[metrics]'\n"
    )


# What goes by the exposition

DASHBOARD = json.loads((ROOT / "contrib/grafana/vhost-device-console.json").read_text())
ALERTS = yaml.safe_load((ROOT / "contrib/prometheus/alerts.yml").read_text())
RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]
PANELS = DASHBOARD["panels"]
QUERIES = [target["expr"] for panel in PANELS for target in panel.get("targets", [])]


def exposed_names() -> set[str]:
    """Return the names of all samples that there can be."""
    return {PREFIX + name for name, _ in parse(text(of(GUEST)))}


def filled_in(query: str) -> str:
    return query.replace("$__rate_interval", "5m").replace("$guest", ".*")


@pytest.mark.parametrize("query", [*QUERIES, *(rule["expr"] for rule in RULES)])
def test_a_query_is_one_that_prometheus_reads_of_metrics_that_there_are(query: str) -> None:
    promql_parser.parse(filled_in(query))
    used = set(re.findall(r"\b[a-z]+(?:_[a-z]+){2,}\b", query)) - {"histogram_quantile"}
    assert used
    assert used <= exposed_names()


def test_every_metric_is_on_the_dashboard_but_for_the_version() -> None:
    shown = set(re.findall(rf"{PREFIX}\w+", " ".join(QUERIES)))
    assert exposed_names() - shown == {PREFIX + "build_info"}


def test_every_panel_has_a_title_of_its_own_and_a_place_of_its_own() -> None:
    titles = [panel["title"] for panel in PANELS]
    assert all(titles)
    assert len(set(titles)) == len(titles)
    taken = [
        (x, y)
        for panel in PANELS
        for at in [panel["gridPos"]]
        for x in range(at["x"], at["x"] + at["w"])
        for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(set(taken)) == len(taken)
    assert max(x for x, _ in taken) < 24


def sources(part: Any) -> Iterator[Any]:
    """Yield every data source that is named anywhere."""
    if isinstance(part, dict):
        for key, value in part.items():
            if key == "datasource":
                yield value
            yield from sources(value)
    elif isinstance(part, list):
        for value in part:
            yield from sources(value)


def test_the_dashboard_asks_whatever_data_source_is_chosen() -> None:
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    named = [*sources(DASHBOARD)]
    assert named
    assert all(each == chosen for each in named)
    assert DASHBOARD["templating"]["list"][0]["name"] == "datasource"
    assert DASHBOARD["templating"]["list"][0]["type"] == "datasource"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_says_what_is_wrong_of_whom(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("info", "warning", "critical")
    assert {*rule["annotations"]} == {"summary", "description"}
    told = set(re.findall(r"\$labels\.(\w+)", " ".join(rule["annotations"].values())))
    assert told <= {"instance", "daemon", "guest", "port", "state"}


def test_no_two_alerts_have_the_same_name() -> None:
    names = [rule["alert"] for rule in RULES]
    assert len(set(names)) == len(names)


def documented() -> list[tuple[str, str, set[str]]]:
    """Return the metrics of the document: name, type, labels."""
    rows = re.findall(
        r"^\| `(\w+)` \| (\w+) \| ([^|]*) \| [^|]+ \|$",
        (ROOT / "docs/metrics.md").read_text(),
        re.MULTILINE,
    )
    return [(name, kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows]


def test_the_document_has_every_metric_with_its_type_and_labels_and_no_other() -> None:
    exposed = []
    for family in text_string_to_metric_families(text(of(GUEST))):
        name = family.name + "_total" * (family.type == "counter")
        labels = {label for each in family.samples for label in each.labels} - {"le"}
        exposed.append((name, family.type, labels))
    assert sorted(documented(), key=str) == sorted(exposed, key=str)
