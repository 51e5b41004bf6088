# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Models without nodes of their own: ControlNets, on the nodes of the denoisers that they help.

Who hosts whom is said by the revisions in use (`workflow.colocation`), of models that were made by
hand too. A ControlNet stands where its hosts' nodes report it, and has as many replicas as they.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from kubediffusion.workflow.colocation import hosting, hosts_of, is_helper
from kubediffusion_operator.planning.cache import PlanCache
from kubediffusion_operator.planning.draining import written
from kubediffusion_operator.planning.failures import Failure, is_ready, of_report
from kubediffusion_operator.planning.models import Replicas, identity_of, pool_of
from kubediffusion_operator.planning.names import (
    is_going,
    items,
    name_of,
    owners_of,
    status_of,
    uid_of,
)
from kubediffusion_operator.planning.pools import PoolPlan
from kubediffusion_operator.planning.residency import report_of
from kubediffusion_operator.planning.revisions import History, Known
from kubediffusion_operator.planning.standing import Standing, learn, misnamed
from kubediffusion_operator.planning.types import ModelReport, Object, Observed, ResidencyReport

NOT_HOSTED = "NotHosted"


def helps(model: Object) -> bool:
    """Whether a DiffusionModel is of those without nodes of their own."""
    return is_helper(str(model["spec"].get("component", "")))


@dataclass(frozen=True, slots=True)
class Hosting:
    """`hosts` are names by the helper's name, sorted; `helpers` the objects by their host's."""

    hosts: Mapping[str, Sequence[str]] = field(default_factory=dict[str, "Sequence[str]"])
    helpers: Mapping[str, Sequence[Object]] = field(default_factory=dict[str, "Sequence[Object]"])


def hosted(
    histories: Iterable[History],
    models: Iterable[Object],
    blind: Iterable[str],
    cache: PlanCache,
) -> Hosting:
    """Who hosts whom of `models`. What workflows use that cannot be followed (`blind`, their uids)
    stays where its status says it is."""
    said: dict[str, set[str]] = {}
    for found in histories:
        for known in _in_use(found):
            key = ("hosting", uid_of(found.workflow), known.revision.name)
            pairs = cache.get(key, lambda known=known: hosting([known.resolved]))
            for helper, hosts in pairs.items():
                said.setdefault(helper, set()).update(hosts)
    unseen = set(blind)
    helpers: dict[str, list[Object]] = {}
    for model in models:
        name = name_of(model)
        if not helps(model) or identity_of(model, cache) != name:
            continue
        if any(str(owner["uid"]) in unseen for owner in owners_of(model)):
            said.setdefault(name, set()).update(map(str, items(status_of(model), "hostedBy")))
        for host in said.get(name, ()):
            helpers.setdefault(host, []).append(model)
    return Hosting(
        {helper: sorted(hosts) for helper, hosts in said.items()},
        {host: sorted(several, key=name_of) for host, several in helpers.items()},
    )


def _in_use(history: History) -> list[Known]:
    """The revisions that are served, will be, or drain; for one plan more what has just ended."""
    served = history.known.get(str(status_of(history.workflow).get("revision") or ""))
    found = [history.newest, served, *(each.known for each in written(history))]
    return list({each.revision.name: each for each in found if each is not None}.values())


# ---------------------------------------------------------------- how they stand


def helper_standing(
    model: Object,
    hosts: Mapping[str, Standing | None],
    observed: Observed,
    pods: Mapping[str, Sequence[Object]],
    pools: Mapping[str, PoolPlan],
    cache: PlanCache,
) -> Standing:
    """`hosts` by name, None where there is no such model; `pods` are those of models."""
    asked: int | None = model["spec"].get("replicas")
    found = Standing(model, Replicas(asked, 0), identity_of(model, cache), helper=True)
    if not found.named_right:
        return misnamed(found)
    reports: list[ResidencyReport] = []
    for name, host in hosts.items():
        plan = pools.get(pool_of(host.model)) if host is not None else None
        found.nodes += host.nodes if host is not None else ()
        mine = [pod for pod in pods.get(name, ()) if not is_going(pod)]
        own = {name_of(pod): report_of(pod, observed.residency) for pod in mine}
        answers = plan.reports if plan is not None else {k: r for k, r in own.items() if r}
        reports += answers.values()
        if plan is not None:
            said = plan.said_of(found.name, name)
        else:
            able = [pod for pod in mine if is_ready(pod)]
            said = [s for pod in able for s in _said(own[name_of(pod)], found.name)]
            said += [s for r in own.values() for s in _said(r, found.name) if s.state == "FAILED"]
        found.at[name] = _at(found, name, host, said, plan)
    learn(found, reports)
    return _together(found, hosts)


def _said(report: ResidencyReport | None, name: str) -> list[ModelReport]:
    return [] if report is None else [each for each in report.models if each.identity == name]


def _at(
    found: Standing,
    name: str,
    host: Standing | None,
    said: Sequence[ModelReport],
    plan: PoolPlan | None,
) -> Standing:
    """How it stands on the nodes of one host. What keeps the host keeps it, and is the host's."""
    wanted = host.replicas.wanted if host is not None else 0
    at = Standing(found.model, Replicas(None, wanted), found.identity, helper=True)
    at.message = f"the nodes of {name} load it"
    if host is None:
        at.reason, at.message = "Starting", f"its host {name} is being made"
        return at
    at.present, at.nodes = host.present, host.nodes
    at.ready = sum(1 for each in said if each.state == "READY")
    at.failure = next((failure for each in said if (failure := of_report(each))), None)
    if plan is not None and plan.has_no_room(found.name, name):
        text = (
            f"no node of ModelPool {name_of(plan.pool)} has room for it beside {name}, which it "
            "helps; raise the pool's memoryLimit, or place that model elsewhere"
        )
        at.failure = Failure("DoesNotFit", text)
    at.settle()
    if not at.is_ready and at.failure is None and not host.is_ready:
        at.reason = host.reason
        at.message = f"it runs on the nodes of {name}: {host.message}"
    return at


def _together(found: Standing, hosts: Mapping[str, Standing | None]) -> Standing:
    """Its replicas are those of its hosts that it is beside."""
    there = list(found.at.values())
    if not there:
        found.reason = NOT_HOSTED
        found.message = (
            "it runs on the nodes of the transformers that workflows use it with, and no workflow "
            "does; name its source under spec.controlNets of one"
        )
        return found
    wanted = sum(at.replicas.wanted for at in there)
    found.replicas = Replicas(found.replicas.asked, wanted)
    found.present, found.ready = sum(a.present for a in there), sum(a.ready for a in there)
    found.failure = next((at.failure for at in there if at.failure is not None), None)
    waiting = next((at for at in there if not at.is_ready), there[0])
    found.reason, found.message = waiting.reason, waiting.message
    selectors = {host.selector for host in hosts.values() if host is not None}
    # Pods of several owners have no common selector.
    found.selector = selectors.pop() if len(selectors) == 1 else ""
    found.settle()
    if found.ready:
        found.message = f"requests can use it, on the nodes of {', '.join(found.at)}"
    return found


def as_used(known: Known, standings: Mapping[str, Standing]) -> dict[str, Standing | None]:
    """By role, how the models of one revision stand: a ControlNet at that revision's denoisers,
    whatever it is elsewhere."""
    models, hosts = known.resolved.models, hosts_of(known.resolved)
    found: dict[str, Standing | None] = {}
    for role, ref in models.items():
        standing = standings.get(ref.identity)
        if standing is not None and role in hosts:
            identities = [models[host].identity for host in hosts[role]]
            there = [standing.at[each] for each in identities if each in standing.at]
            standing = min(
                there, key=lambda at: (at.is_ready, at.failure is None), default=standing
            )
        found[role] = standing
    return found
