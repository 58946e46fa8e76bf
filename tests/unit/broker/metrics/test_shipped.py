"""Dashboard, alerts and runbook belong together, and ask only for what is exposed."""

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from metrics_source import BURSTING, FakeSource, guest
from prometheus_client.parser import text_string_to_metric_families

from guestd.broker.metrics import serve
from guestd.broker.metrics.exposition import Exposition

SHIPPED = Path(serve.__file__).parent / "shipped"
ALERTS, RUNBOOK = (SHIPPED / "alerts.yml").read_text(), (SHIPPED / "runbook.md").read_text()
DASHBOARD: dict[str, Any] = json.loads((SHIPPED / "dashboard.json").read_text())
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
NAMES = re.findall(r"- alert: (\w+)", ALERTS)


def test_every_alert_has_its_paragraph_and_every_paragraph_its_alert() -> None:
    assert re.findall(r"^## (\w+)$", RUNBOOK, re.MULTILINE) == NAMES
    assert re.findall(r"runbook_url: runbook.md#(\w+)", ALERTS) == [name.lower() for name in NAMES]
    for paragraph in RUNBOOK.split("\n## ")[1:]:
        assert len(paragraph.split()) > 25, paragraph


def test_every_alert_says_how_bad_it_is_and_is_tested() -> None:
    assert len(re.findall(r"labels: \{severity: (?:page|ticket)\}", ALERTS)) == len(NAMES) == len(set(NAMES))
    tested = (SHIPPED / "alerts_test.yml").read_text()
    for name in NAMES:
        assert f"alertname: {name}\n        exp_alerts: []" in tested, f"{name}: when it is quiet"
        assert f"alertname: {name}\n        exp_alerts:\n" in tested, f"{name}: when it fires"


@pytest.mark.parametrize("where", ["alerts", "dashboard", "runbook"])
async def test_only_metrics_that_are_exposed_are_asked_for(where: str) -> None:
    source = FakeSource(guest("a", quota=1000), guest("b", limits=BURSTING))
    text, _ = await Exposition(source).render("")
    exposed = {one.name for family in text_string_to_metric_families(text.decode()) for one in family.samples}
    exposed |= {family.name for family in text_string_to_metric_families(text.decode())}
    said = {"alerts": ALERTS, "dashboard": json.dumps(PANELS), "runbook": RUNBOOK}[where]
    asked = set(re.findall(r"\b(?:guestd|process)_[a-z_]+\b", said))
    assert asked <= exposed
    assert asked or where == "runbook"


def test_panels_have_a_source_and_a_place_of_their_own() -> None:
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    for panel in PANELS:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for target in panel.get("targets", ()):
            assert target["expr"] and target["datasource"]["uid"] == "${datasource}"
    for one, other in combinations((panel["gridPos"] for panel in PANELS), 2):
        apart_x = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        apart_y = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert apart_x or apart_y


def test_whoever_looks_chooses_source_host_and_guest() -> None:
    assert [one["name"] for one in DASHBOARD["templating"]["list"]] == ["datasource", "instance", "guest"]
