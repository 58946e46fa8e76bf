"""A real Prometheus server on loopback that scrapes one broker, and what it answers."""

import asyncio
import json
import os
import shutil
import time
import urllib.parse
import urllib.request
from http import HTTPStatus
from pathlib import Path
from typing import Any, Self

import pytest
from process_rig import Process

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "guestd" / "broker" / "metrics" / "shipped"
_SECONDS = 30.0
_FETCHED = ROOT / "build" / "monitoring" / "usr" / "bin"


def program(name: str) -> str:
    """Where that program of Prometheus is. Without it the test skips, or fails under GUESTD_REQUIRE_VM=1."""
    found = shutil.which(name) or shutil.which(name, path=str(_FETCHED))
    if found is None:
        missing = f"no {name} here: `make setup-monitoring` fetches it from Debian"
        if os.environ.get("GUESTD_REQUIRE_VM") == "1":
            pytest.fail(missing, pytrace=False)
        pytest.skip(missing)
    return found


class Prometheus(Process):
    """Scrapes `target` four times a second, with the shipped rules."""

    def __init__(self, root: Path, port: int, target: str) -> None:
        super().__init__(root / "prometheus.log")
        self._data, self._config, self._url = root / "prometheus", root / "prometheus.yml", f"http://127.0.0.1:{port}"
        self._config.write_text(
            f"global: {{scrape_interval: 250ms, evaluation_interval: 1s}}\nrule_files: ['{SHIPPED}/alerts.yml']\n"
            f"scrape_configs:\n  - {{job_name: guestd, static_configs: [{{targets: ['{target}']}}]}}\n"
        )

    async def __aenter__(self) -> Self:
        listen = self._url.removeprefix("http://")
        await self.spawn(
            program("prometheus"),
            f"--config.file={self._config}",
            f"--storage.tsdb.path={self._data}",
            f"--web.listen-address={listen}",
            "--log.level=warn",
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kill()

    async def get(self, path: str, **parameters: str) -> Any:
        """The data of its answer; None while it does not answer yet.

        :raise AssertionError: When it says that the request is wrong.
        """
        url = f"{self._url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            answer = await asyncio.to_thread(_fetch, url)
        except ConnectionRefusedError:
            assert self.running, self.said
            return None
        assert answer["status"] == "success", f"{parameters}: {answer.get('error')}"
        return answer["data"]

    async def query(self, expression: str) -> list[Any]:
        """The series of an instant query."""
        data = await self.get("query", query=expression)
        return data["result"] if data is not None else []

    async def until(self, expression: str) -> list[Any]:
        """The same, as soon as there are any.

        :raise AssertionError: When there are none in time.
        """
        end = time.monotonic() + _SECONDS
        while not (found := await self.query(expression)):
            assert time.monotonic() < end, f"nothing within {_SECONDS:g} s: {expression}\n{self.said}"
            await asyncio.sleep(0.1)
        return found


def _fetch(url: str) -> Any:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        if error.code == HTTPStatus.SERVICE_UNAVAILABLE:  # it listens before it is ready, and says so in plain text
            raise ConnectionRefusedError from error
        return json.load(error)
    except urllib.error.URLError as error:
        raise error.reason if isinstance(error.reason, OSError) else error from None
