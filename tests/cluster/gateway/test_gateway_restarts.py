# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Gateways that come and go behind one address, as a Deployment's do behind its Service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import openai
import pytest
from conftest import StartGateway, StartNode
from follow_rig import GatewayPod, Revised, Service, publish_slice, until

from kubediffusion.client import AsyncClient
from tests.cluster.kube import Kube

WORKFLOW = Revised("sd3", "file:///models/one")
# Pictures of a client, by the attempt's number. Raises where one is lost.
Draw = Callable[[int], Awaitable[None]]


@pytest.fixture
def served(kube: Kube, node: StartNode) -> None:
    """A workflow on two nodes; a picture takes a while."""
    pods = [node(name, WORKFLOW.resolved, step_seconds=0.02) for name in ("n1", "n2")]
    WORKFLOW.publish(kube)
    publish_slice(kube, "sd3", [pod.ready() for pod in pods])


@asynccontextmanager
async def drawing(draws: list[Draw]) -> AsyncIterator[Callable[[int], Awaitable[None]]]:
    """Draws on and on; gives a function that waits for so many more pictures.

    Raises what any of them raised.
    """
    done = 0
    more = asyncio.Condition()

    async def keep_on(draw: Draw) -> None:
        nonlocal done
        number = 0
        while True:
            await draw(number)
            number += 1
            async with more:
                done += 1
                more.notify_all()

    tasks = [asyncio.create_task(keep_on(draw)) for draw in draws]

    async def wait(count: int) -> None:
        wanted = done + count

        async def enough() -> None:
            async with more:
                await more.wait_for(lambda: done >= wanted)

        waiting = asyncio.create_task(enough())
        ended, _ = await asyncio.wait(
            {waiting, *tasks}, timeout=120, return_when=asyncio.FIRST_COMPLETED
        )
        waiting.cancel()
        for task in ended - {waiting}:
            task.result()
        assert waiting in ended, f"{count} more pictures"

    try:
        yield wait
    finally:
        for task in tasks:
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
    lost = [end for end in ends if not isinstance(end, asyncio.CancelledError)]
    assert not lost, lost


async def roll(
    service: Service,
    start: StartGateway,
    wait: Callable[[int], Awaitable[None]],
    *,
    drain: str = "60",
) -> None:
    """Replaces each gateway as a Deployment with maxSurge 1 and maxUnavailable 0 does."""
    for number, old in enumerate([*service.pods]):
        new = start(f"new-{number}", SHUTDOWN_DELAY="1", DRAIN_SECONDS=drain)
        await asyncio.to_thread(new.ready)
        service.pods.append(new)
        await wait(4)
        old.terminate()
        assert await asyncio.to_thread(old.exit_code) == 0
        service.pods.remove(old)
        await wait(4)


async def two(start: StartGateway, drain: str = "60") -> list[GatewayPod]:
    pods = [start(f"old-{number}", SHUTDOWN_DELAY="1", DRAIN_SECONDS=drain) for number in range(2)]
    for pod in pods:
        await asyncio.to_thread(pod.ready)
    return pods


@pytest.mark.parametrize("drain", ["60", "0"], ids=["with time to drain", "without any"])
async def test_a_rolling_restart_loses_no_request_of_our_client(
    served: None, gateway: StartGateway, drain: str
) -> None:
    """Without a drain every request under way is cut off; the client goes on by its key."""
    async with (
        Service("grpc", await two(gateway, drain)) as service,
        AsyncClient(service.address) as one,
        AsyncClient(service.address) as other,
    ):

        def draws(client: AsyncClient) -> Draw:
            async def draw(number: int) -> None:
                image = await client.image("sd3", prompt="a fox", seed=number, steps=20)
                assert image.seed == number

            return draw

        async with drawing([draws(one), draws(other), draws(one)]) as wait:
            await wait(4)
            await roll(service, gateway, wait, drain=drain)


async def test_a_rolling_restart_loses_no_request_of_the_openai_package(
    served: None, gateway: StartGateway
) -> None:
    """Its connections are kept alive; it sends again only what never got an answer."""
    async with Service("http", await two(gateway)) as service:

        async def draw(number: int) -> None:
            answer = await client.images.generate(
                model="sd3", prompt="a fox", extra_body={"seed": number, "steps": 20}
            )
            assert answer.data

        async with (
            openai.AsyncOpenAI(
                base_url=f"http://{service.address}/v1", api_key="none", max_retries=2
            ) as client,
            drawing([draw, draw, draw]) as wait,
        ):
            await wait(4)
            await roll(service, gateway, wait)


async def test_a_gateway_serves_on_until_its_delay_is_over_though_it_is_not_ready(
    served: None, gateway: StartGateway
) -> None:
    pod = gateway(SHUTDOWN_DELAY="3600").ready()
    async with AsyncClient(pod.grpc, attempts=1) as client:
        await client.image("sd3", prompt="a fox", steps=4)
        pod.terminate()
        await asyncio.to_thread(until, lambda: not pod.is_ready, "it is not ready any more")
        assert pod.get("/healthz").status_code == 200
        await client.image("sd3", prompt="a fox", steps=4)
    pod.terminate()  # the second time at once
    assert await asyncio.to_thread(pod.exit_code) != 0


async def test_a_killed_gateway_costs_a_retry_and_no_picture(
    served: None, gateway: StartGateway
) -> None:
    async with (
        Service("grpc", await two(gateway)) as service,
        AsyncClient(service.address, attempts=20) as client,
    ):

        async def draw(number: int) -> None:
            await client.image("sd3", prompt="a fox", seed=number, steps=20)

        async with drawing([draw, draw]) as wait:
            await wait(4)
            service.pods.pop(0).kill()
            await wait(6)
