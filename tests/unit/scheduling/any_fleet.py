# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Any fleet and any task, for the tests of placement."""

from __future__ import annotations

from hypothesis import strategies as st

from kubediffusion.scheduling.fleet import NodeState
from kubediffusion.scheduling.placement import PlacementTask

NOW = 100.0
MODELS = ("a", "b", "c")
seconds = st.floats(0, 1000, allow_nan=False)


@st.composite
def fleets(draw) -> list[NodeState]:
    nodes = []
    for number in range(draw(st.integers(0, 6))):
        ready = frozenset(draw(st.sets(st.sampled_from(MODELS))))
        loading = draw(st.sets(st.sampled_from(MODELS))) - ready
        nodes.append(
            NodeState(
                address=f"n{number}",
                host_id=draw(st.sampled_from(["h1", "h2"])),
                fingerprint=draw(st.sampled_from(["f1", "f2"])),
                ready=ready,
                loading={model: draw(st.floats(0, NOW)) for model in loading},
                queue_seconds=draw(seconds),
                draining=draw(st.booleans()),
                suspect=draw(st.booleans()),
                full_until=draw(st.sampled_from([0.0, NOW - 1, NOW + 1])),
                last_placed=draw(st.integers(0, 5)),
            )
        )
    return nodes


tasks = st.builds(
    PlacementTask,
    model=st.sampled_from(MODELS),
    stage=st.just("denoise"),
    units=st.floats(1, 1000),
    helpers=st.lists(st.sampled_from(MODELS), max_size=2, unique=True).map(tuple),
    inputs=st.dictionaries(st.sampled_from(["n0", "n1", "gone"]), st.integers(0, 10**9)),
    failed_on=st.frozensets(st.sampled_from(["n0", "n1", "n2"])),
    resume_fingerprint=st.sampled_from(["", "f1", "f9"]),
    resume_fraction=st.floats(0, 1),
)
