# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Whether a node takes a task: what can be known before anything is fetched or computed."""

from __future__ import annotations

from collections import OrderedDict

from kubediffusion.errors import InvalidInput
from kubediffusion.node.inputs import Inputs, UndeclaredError, declared
from kubediffusion.node.residency import Residency
from kubediffusion.node.session import MAX_NAME
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
    ) -> tuple[list[Resident], tuple[node_pb2.LoraUse, ...]]:
        """The models that the task runs on, its own first, and its LoRAs as they are declared;
        remembers its epoch.

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
        residents = self._models_for(assign)
        self._check(assign, residents[0])
        loras = _declared(assign, residents[0])
        if tasks >= self._max_tasks:
            raise RefusedError(
                node_pb2.DECLINE_REASON_QUEUE_FULL, f"{tasks} tasks are here already"
            )
        self._remember((key.request_id, key.task), key.epoch)
        return residents, loras

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

    def _models_for(self, assign: node_pb2.Assign) -> list[Resident]:
        wanted = [assign.model]
        for helper in assign.lease.helpers:
            elsewhere = helper.address and helper.address != self._store.address
            if helper.kind != node_pb2.Helper.KIND_CONTROLNET or elsewhere:
                raise RefusedError(
                    node_pb2.DECLINE_REASON_NOT_RESIDENT,
                    f"helper {helper.name or helper.model}: only a ControlNet on the lease's own "
                    "node can help it",
                )
            wanted.append(helper.model)
        found = [(identity, self._residency.ready_model(identity)) for identity in wanted]
        missing = [identity for identity, resident in found if resident is None]
        if missing:
            raise RefusedError(
                node_pb2.DECLINE_REASON_NOT_RESIDENT, f"model {missing[0]} is not ready here"
            )
        return [resident for _, resident in found if resident is not None]

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
