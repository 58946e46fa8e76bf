"""Real VMs for tests: an image built once, machines that always end."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack

import pytest

from guestd.lab import tools
from guestd.lab.errors import LabUnavailable
from guestd.lab.image import GuestImage, build
from guestd.lab.machine import Machine
from guestd.lab.qemu import MachineConfig

MachineFactory = Callable[[MachineConfig], Awaitable[Machine]]


@pytest.fixture(scope="session")
def guest_image() -> GuestImage:
    """The image of this checkout. Without what it takes the tests skip, or fail under GUESTD_REQUIRE_VM=1."""
    return _image(apps=False)


@pytest.fixture(scope="session")
def apps_image() -> GuestImage:
    """The same with `debian.APPS` in it; the first build of its base takes a minute."""
    return _image(apps=True)


def _image(*, apps: bool) -> GuestImage:
    try:
        tools.require(tools.RUN_TOOLS)
        return asyncio.run(build(lambda line: print(f"==> {line}", flush=True), apps=apps))
    except LabUnavailable as error:
        if os.environ.get("GUESTD_REQUIRE_VM") == "1":
            pytest.fail(str(error), pytrace=False)
        pytest.skip(str(error))


@pytest.fixture
async def machine_factory(guest_image: GuestImage) -> AsyncIterator[MachineFactory]:
    """Start machines: `await machine_factory(MachineConfig(...))`, booted when it returns.

    They end with the test, whatever happens. GUESTD_LAB_ACCEL overrides the accelerator.
    """
    async with AsyncExitStack() as stack:

        async def start(config: MachineConfig) -> Machine:
            machine = Machine(guest_image, config, accel=os.environ.get("GUESTD_LAB_ACCEL") or None)
            await stack.enter_async_context(machine)
            await machine.wait_booted()
            return machine

        yield start
