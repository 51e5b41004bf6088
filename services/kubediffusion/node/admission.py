# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Whether a node takes a task: what can be known before anything is fetched or computed."""

from __future__ import annotations

from collections import OrderedDict

from kubediffusion.errors import InvalidInput
from kubediffusion.node.inputs import Inputs, UndeclaredError, declared
from kubediffusion.node.residency import Residency
from kubediffusion.node.session import MAX_NAME
from kubediffusion.node.sharing import EXACT_BRANCH, PARTS
from kubediffusion.node.tasks import Name, Resident
from kubediffusion.tensors import TensorStore
from kubediffusion.v1alpha1 import node_pb2

# So many tasks' epochs are remembered; a coordinator's late message is seconds old, not thousands
# of requests.
REMEMBERED_EPOCHS = 16_384


class RefusedError(Exception):
    """A task is declined: nobody's mistake, another node may take it."""

    def __init__(self, reason: node_pb2.DeclineReason, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


class Admission:
    def __init__(
        self,
        residency: Residency,
        inputs: Inputs,
        store: TensorStore,
        fingerprint: str,
        max_tasks: int,
    ) -> None:
        self._residency = residency
        self._inputs = inputs
        self._store = store
        self._fingerprint = fingerprint
        self._max_tasks = max_tasks
        self._epochs: OrderedDict[Name, int] = OrderedDict()

    def examine(
        self, assign: node_pb2.Assign, *, draining: bool, tasks: int, present: int | None
    ) -> tuple[Resident, list[Resident | None], tuple[node_pb2.LoraUse, ...]]:
        """The task's model, those of its lease's helpers (None for one that is elsewhere and not
        here), and its LoRAs as they are declared; remembers its epoch.

        `tasks` are here already; `present` is the epoch of one of this name that is, which a
        newer epoch replaces. Raises RefusedError, and InvalidInput where the task is at fault.
        """
        key = assign.key
        if not (0 < len(key.request_id) <= MAX_NAME and 0 < len(key.task) <= MAX_NAME):
            raise InvalidInput(
                f"a request and a task have names of 1 to {MAX_NAME} characters", field="key"
            )
        if draining:
            raise RefusedError(node_pb2.DECLINE_REASON_DRAINING, "the node is draining")
        self._check_epoch(key, present)
        resident = self._ready(assign.model)
        helpers = [self._helper(assign, helper) for helper in assign.lease.helpers]
        self._check(assign, resident)
        loras = _declared(assign, resident)
        if tasks >= self._max_tasks:
            raise RefusedError(
                node_pb2.DECLINE_REASON_QUEUE_FULL, f"{tasks} tasks are here already"
            )
        self._remember((key.request_id, key.task), key.epoch)
        return resident, helpers, loras

    def _check_epoch(self, key: node_pb2.TaskKey, present: int | None) -> None:
        highest = self._epochs.get((key.request_id, key.task), 0)
        if key.epoch < highest or present == key.epoch:
            raise RefusedError(
                node_pb2.DECLINE_REASON_OLD_EPOCH,
                f"task {key.task} is at epoch {highest}, and this is {key.epoch}",
            )

    def _remember(self, name: Name, epoch: int) -> None:
        self._epochs[name] = epoch
        self._epochs.move_to_end(name)
        while len(self._epochs) > REMEMBERED_EPOCHS:
            self._epochs.popitem(last=False)

    def _ready(self, identity: str) -> Resident:
        resident = self._residency.ready_model(identity)
        if resident is None:
            raise RefusedError(
                node_pb2.DECLINE_REASON_NOT_RESIDENT, f"model {identity} is not ready here"
            )
        return resident

    def _helper(self, assign: node_pb2.Assign, helper: node_pb2.Helper) -> Resident | None:
        if helper.kind not in PARTS:
            raise RefusedError(
                node_pb2.DECLINE_REASON_PROTOCOL, "this node does not know such helpers"
            )
        if helper.address == self._store.address:
            helper.ClearField("address")
        if helper.kind == node_pb2.Helper.KIND_CFG_BRANCH:
            _check_branch(assign, helper)
            return None
        if helper.address:
            return self._residency.ready_model(helper.model)
        return self._ready(helper.model)

    def _check(self, assign: node_pb2.Assign, resident: Resident) -> None:
        model = resident.loaded
        if assign.stage not in model.stages:
            raise InvalidInput(
                f"model {assign.model} has no stage {assign.stage!r}; it has "
                f"{', '.join(model.stages)}",
                field="stage",
            )
        if assign.stage == "denoise" and resident.denoiser is None:
            raise InvalidInput(f"model {assign.model} cannot denoise", field="stage")
        if assign.HasField("step_cache") and assign.numerics != node_pb2.NUMERICS_FAST:
            raise InvalidInput(
                "a step that is left out is not exact; ask for numerics fast", field="step_cache"
            )
        self._inputs.check(assign)
        resume = assign.lease.resume
        exact = assign.numerics != node_pb2.NUMERICS_FAST
        if is_begun(resume) and exact and resume.fingerprint != self._fingerprint:
            raise RefusedError(
                node_pb2.DECLINE_REASON_FINGERPRINT,
                f"the checkpoint is of {resume.fingerprint}; going on with {self._fingerprint} "
                "would give other bits",
            )


def _check_branch(assign: node_pb2.Assign, helper: node_pb2.Helper) -> None:
    """Raises InvalidInput where a branch cannot be computed elsewhere."""
    if assign.numerics != node_pb2.NUMERICS_FAST:
        raise InvalidInput(EXACT_BRANCH, field="numerics")
    if assign.HasField("budget"):
        raise InvalidInput(
            "a pruned request keeps both its branches on one node, for they keep the same tokens; "
            "send it without a helper for a branch",
            field="budget",
        )
    if assign.HasField("step_cache"):
        raise InvalidInput(
            "a step cache is of both branches, on one node; send it without a helper for a branch",
            field="step_cache",
        )
    if not helper.address or helper.model != assign.model:
        raise InvalidInput(
            "a branch is computed by the lease's own model on another node", field="helpers"
        )


def _declared(assign: node_pb2.Assign, resident: Resident) -> tuple[node_pb2.LoraUse, ...]:
    """A gateway that sends one which is not declared knows a newer plan than this node, or an older
    one: another node may take it, and so may this one once it is told."""
    try:
        return declared(assign, resident.spec)
    except UndeclaredError as error:
        raise RefusedError(node_pb2.DECLINE_REASON_NOT_RESIDENT, str(error)) from None


def is_begun(checkpoint: node_pb2.Checkpoint) -> bool:
    """False for the empty one of a lease that was given back before its first step."""
    return bool(checkpoint.tensors) or checkpoint.step > 0
