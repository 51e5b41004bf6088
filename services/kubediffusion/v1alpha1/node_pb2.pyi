from kubediffusion.v1alpha1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Numerics(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    NUMERICS_UNSPECIFIED: _ClassVar[Numerics]
    NUMERICS_EXACT: _ClassVar[Numerics]
    NUMERICS_FAST: _ClassVar[Numerics]

class DeclineReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DECLINE_REASON_UNSPECIFIED: _ClassVar[DeclineReason]
    DECLINE_REASON_DRAINING: _ClassVar[DeclineReason]
    DECLINE_REASON_NOT_RESIDENT: _ClassVar[DeclineReason]
    DECLINE_REASON_QUEUE_FULL: _ClassVar[DeclineReason]
    DECLINE_REASON_OLD_EPOCH: _ClassVar[DeclineReason]
    DECLINE_REASON_OUT_OF_MEMORY: _ClassVar[DeclineReason]
    DECLINE_REASON_FINGERPRINT: _ClassVar[DeclineReason]
    DECLINE_REASON_PROTOCOL: _ClassVar[DeclineReason]

class FailureReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FAILURE_REASON_UNSPECIFIED: _ClassVar[FailureReason]
    FAILURE_REASON_INVALID_INPUT: _ClassVar[FailureReason]
    FAILURE_REASON_INPUT_LOST: _ClassVar[FailureReason]
    FAILURE_REASON_OUT_OF_MEMORY: _ClassVar[FailureReason]
    FAILURE_REASON_INTERNAL: _ClassVar[FailureReason]
    FAILURE_REASON_CANCELLED: _ClassVar[FailureReason]
    FAILURE_REASON_HELPER_LOST: _ClassVar[FailureReason]

class ModelState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MODEL_STATE_UNSPECIFIED: _ClassVar[ModelState]
    MODEL_STATE_PENDING: _ClassVar[ModelState]
    MODEL_STATE_DOWNLOADING: _ClassVar[ModelState]
    MODEL_STATE_LOADING: _ClassVar[ModelState]
    MODEL_STATE_READY: _ClassVar[ModelState]
    MODEL_STATE_FAILED: _ClassVar[ModelState]
    MODEL_STATE_EVICTING: _ClassVar[ModelState]
NUMERICS_UNSPECIFIED: Numerics
NUMERICS_EXACT: Numerics
NUMERICS_FAST: Numerics
DECLINE_REASON_UNSPECIFIED: DeclineReason
DECLINE_REASON_DRAINING: DeclineReason
DECLINE_REASON_NOT_RESIDENT: DeclineReason
DECLINE_REASON_QUEUE_FULL: DeclineReason
DECLINE_REASON_OLD_EPOCH: DeclineReason
DECLINE_REASON_OUT_OF_MEMORY: DeclineReason
DECLINE_REASON_FINGERPRINT: DeclineReason
DECLINE_REASON_PROTOCOL: DeclineReason
FAILURE_REASON_UNSPECIFIED: FailureReason
FAILURE_REASON_INVALID_INPUT: FailureReason
FAILURE_REASON_INPUT_LOST: FailureReason
FAILURE_REASON_OUT_OF_MEMORY: FailureReason
FAILURE_REASON_INTERNAL: FailureReason
FAILURE_REASON_CANCELLED: FailureReason
FAILURE_REASON_HELPER_LOST: FailureReason
MODEL_STATE_UNSPECIFIED: ModelState
MODEL_STATE_PENDING: ModelState
MODEL_STATE_DOWNLOADING: ModelState
MODEL_STATE_LOADING: ModelState
MODEL_STATE_READY: ModelState
MODEL_STATE_FAILED: ModelState
MODEL_STATE_EVICTING: ModelState

class ProtocolRange(_message.Message):
    __slots__ = ("min", "max")
    MIN_FIELD_NUMBER: _ClassVar[int]
    MAX_FIELD_NUMBER: _ClassVar[int]
    min: int
    max: int
    def __init__(self, min: _Optional[int] = ..., max: _Optional[int] = ...) -> None: ...

class TaskKey(_message.Message):
    __slots__ = ("request_id", "task", "epoch")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    task: str
    epoch: int
    def __init__(self, request_id: _Optional[str] = ..., task: _Optional[str] = ..., epoch: _Optional[int] = ...) -> None: ...

class WorkRequest(_message.Message):
    __slots__ = ("hello", "assign", "cancel", "release", "renew", "drain")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    ASSIGN_FIELD_NUMBER: _ClassVar[int]
    YIELD_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    RENEW_FIELD_NUMBER: _ClassVar[int]
    DRAIN_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    assign: Assign
    cancel: Cancel
    release: Release
    renew: Renew
    drain: Drain
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., assign: _Optional[_Union[Assign, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., release: _Optional[_Union[Release, _Mapping]] = ..., renew: _Optional[_Union[Renew, _Mapping]] = ..., drain: _Optional[_Union[Drain, _Mapping]] = ..., **kwargs) -> None: ...

class Hello(_message.Message):
    __slots__ = ("gateway_id", "protocol", "lease_seconds")
    GATEWAY_ID_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    LEASE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    gateway_id: str
    protocol: ProtocolRange
    lease_seconds: int
    def __init__(self, gateway_id: _Optional[str] = ..., protocol: _Optional[_Union[ProtocolRange, _Mapping]] = ..., lease_seconds: _Optional[int] = ...) -> None: ...

class Assign(_message.Message):
    __slots__ = ("key", "model", "stage", "inputs", "outputs", "loras", "lease", "workflow", "tenant", "weight", "priority", "remaining_ms", "numerics", "budget", "traceparent", "tracestate", "expected_seconds", "step_cache")
    class InputsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: _tensor_pb2.Value
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[_tensor_pb2.Value, _Mapping]] = ...) -> None: ...
    KEY_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    LORAS_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    WORKFLOW_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    REMAINING_MS_FIELD_NUMBER: _ClassVar[int]
    NUMERICS_FIELD_NUMBER: _ClassVar[int]
    BUDGET_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    TRACESTATE_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_SECONDS_FIELD_NUMBER: _ClassVar[int]
    STEP_CACHE_FIELD_NUMBER: _ClassVar[int]
    key: TaskKey
    model: str
    stage: str
    inputs: _containers.MessageMap[str, _tensor_pb2.Value]
    outputs: _containers.RepeatedScalarFieldContainer[str]
    loras: _containers.RepeatedCompositeFieldContainer[LoraUse]
    lease: Lease
    workflow: str
    tenant: str
    weight: float
    priority: int
    remaining_ms: int
    numerics: Numerics
    budget: float
    traceparent: str
    tracestate: str
    expected_seconds: float
    step_cache: StepCache
    def __init__(self, key: _Optional[_Union[TaskKey, _Mapping]] = ..., model: _Optional[str] = ..., stage: _Optional[str] = ..., inputs: _Optional[_Mapping[str, _tensor_pb2.Value]] = ..., outputs: _Optional[_Iterable[str]] = ..., loras: _Optional[_Iterable[_Union[LoraUse, _Mapping]]] = ..., lease: _Optional[_Union[Lease, _Mapping]] = ..., workflow: _Optional[str] = ..., tenant: _Optional[str] = ..., weight: _Optional[float] = ..., priority: _Optional[int] = ..., remaining_ms: _Optional[int] = ..., numerics: _Optional[_Union[Numerics, str]] = ..., budget: _Optional[float] = ..., traceparent: _Optional[str] = ..., tracestate: _Optional[str] = ..., expected_seconds: _Optional[float] = ..., step_cache: _Optional[_Union[StepCache, _Mapping]] = ...) -> None: ...

class StepCache(_message.Message):
    __slots__ = ("method", "threshold", "ratios", "max_skip_steps", "retention")
    METHOD_FIELD_NUMBER: _ClassVar[int]
    THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    RATIOS_FIELD_NUMBER: _ClassVar[int]
    MAX_SKIP_STEPS_FIELD_NUMBER: _ClassVar[int]
    RETENTION_FIELD_NUMBER: _ClassVar[int]
    method: str
    threshold: float
    ratios: _containers.RepeatedScalarFieldContainer[float]
    max_skip_steps: int
    retention: float
    def __init__(self, method: _Optional[str] = ..., threshold: _Optional[float] = ..., ratios: _Optional[_Iterable[float]] = ..., max_skip_steps: _Optional[int] = ..., retention: _Optional[float] = ...) -> None: ...

class LoraUse(_message.Message):
    __slots__ = ("name", "uri", "revision", "scale", "subfolder", "weight_name")
    NAME_FIELD_NUMBER: _ClassVar[int]
    URI_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    SUBFOLDER_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    uri: str
    revision: str
    scale: float
    subfolder: str
    weight_name: str
    def __init__(self, name: _Optional[str] = ..., uri: _Optional[str] = ..., revision: _Optional[str] = ..., scale: _Optional[float] = ..., subfolder: _Optional[str] = ..., weight_name: _Optional[str] = ...) -> None: ...

class Lease(_message.Message):
    __slots__ = ("checkpoint_every", "preview_every", "resume", "helpers")
    CHECKPOINT_EVERY_FIELD_NUMBER: _ClassVar[int]
    PREVIEW_EVERY_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    HELPERS_FIELD_NUMBER: _ClassVar[int]
    checkpoint_every: int
    preview_every: int
    resume: Checkpoint
    helpers: _containers.RepeatedCompositeFieldContainer[Helper]
    def __init__(self, checkpoint_every: _Optional[int] = ..., preview_every: _Optional[int] = ..., resume: _Optional[_Union[Checkpoint, _Mapping]] = ..., helpers: _Optional[_Iterable[_Union[Helper, _Mapping]]] = ...) -> None: ...

class Helper(_message.Message):
    __slots__ = ("kind", "model", "address", "name")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        KIND_UNSPECIFIED: _ClassVar[Helper.Kind]
        KIND_CONTROLNET: _ClassVar[Helper.Kind]
        KIND_CFG_BRANCH: _ClassVar[Helper.Kind]
    KIND_UNSPECIFIED: Helper.Kind
    KIND_CONTROLNET: Helper.Kind
    KIND_CFG_BRANCH: Helper.Kind
    KIND_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    kind: Helper.Kind
    model: str
    address: str
    name: str
    def __init__(self, kind: _Optional[_Union[Helper.Kind, str]] = ..., model: _Optional[str] = ..., address: _Optional[str] = ..., name: _Optional[str] = ...) -> None: ...

class Checkpoint(_message.Message):
    __slots__ = ("step", "total_steps", "tensors", "fingerprint")
    class TensorsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: _tensor_pb2.TensorRef
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[_tensor_pb2.TensorRef, _Mapping]] = ...) -> None: ...
    STEP_FIELD_NUMBER: _ClassVar[int]
    TOTAL_STEPS_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    step: int
    total_steps: int
    tensors: _containers.MessageMap[str, _tensor_pb2.TensorRef]
    fingerprint: str
    def __init__(self, step: _Optional[int] = ..., total_steps: _Optional[int] = ..., tensors: _Optional[_Mapping[str, _tensor_pb2.TensorRef]] = ..., fingerprint: _Optional[str] = ...) -> None: ...

class Yield(_message.Message):
    __slots__ = ("key",)
    KEY_FIELD_NUMBER: _ClassVar[int]
    key: TaskKey
    def __init__(self, key: _Optional[_Union[TaskKey, _Mapping]] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class Release(_message.Message):
    __slots__ = ("request_ids",)
    REQUEST_IDS_FIELD_NUMBER: _ClassVar[int]
    request_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, request_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class Renew(_message.Message):
    __slots__ = ("needed_models",)
    NEEDED_MODELS_FIELD_NUMBER: _ClassVar[int]
    needed_models: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, needed_models: _Optional[_Iterable[str]] = ...) -> None: ...

class Drain(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WorkEvent(_message.Message):
    __slots__ = ("welcome", "accepted", "declined", "progress", "preview", "checkpoint", "done", "failed", "yielded", "load")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    DECLINED_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    PREVIEW_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    YIELDED_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    accepted: Accepted
    declined: Declined
    progress: Progress
    preview: Preview
    checkpoint: CheckpointTaken
    done: Done
    failed: Failed
    yielded: Yielded
    load: LoadReport
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., accepted: _Optional[_Union[Accepted, _Mapping]] = ..., declined: _Optional[_Union[Declined, _Mapping]] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ..., preview: _Optional[_Union[Preview, _Mapping]] = ..., checkpoint: _Optional[_Union[CheckpointTaken, _Mapping]] = ..., done: _Optional[_Union[Done, _Mapping]] = ..., failed: _Optional[_Union[Failed, _Mapping]] = ..., yielded: _Optional[_Union[Yielded, _Mapping]] = ..., load: _Optional[_Union[LoadReport, _Mapping]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("node", "protocol")
    NODE_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    node: DescribeResponse
    protocol: int
    def __init__(self, node: _Optional[_Union[DescribeResponse, _Mapping]] = ..., protocol: _Optional[int] = ...) -> None: ...

class Accepted(_message.Message):
    __slots__ = ("key",)
    KEY_FIELD_NUMBER: _ClassVar[int]
    key: TaskKey
    def __init__(self, key: _Optional[_Union[TaskKey, _Mapping]] = ...) -> None: ...

class Declined(_message.Message):
    __slots__ = ("key", "reason", "message")
    KEY_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    key: TaskKey
    reason: DeclineReason
    message: str
    def __init__(self, key: _Optional[_Union[TaskKey, _Mapping]] = ..., reason: _Optional[_Union[DeclineReason, str]] = ..., message: _Optional[str] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("key", "step", "total_steps", "seconds")
    KEY_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    TOTAL_STEPS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    key: TaskKey
    step: int
    total_steps: int
    seconds: float
    def __init__(self, key: _Optional[_Union[TaskKey, _Mapping]] = ..., step: _Optional[int] = ..., total_steps: _Optional[int] = ..., seconds: _Optional[float] = ...) -> None: ...

class Preview(_message.Message):
    __slots__ = ("key", "step", "image")
    KEY_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    key: TaskKey
    step: int
    image: _tensor_pb2.TensorRef
    def __init__(self, key: _Optional[_Union[TaskKey, _Mapping]] = ..., step: _Optional[int] = ..., image: _Optional[_Union[_tensor_pb2.TensorRef, _Mapping]] = ...) -> None: ...

class CheckpointTaken(_message.Message):
    __slots__ = ("key", "checkpoint")
    KEY_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    key: TaskKey
    checkpoint: Checkpoint
    def __init__(self, key: _Optional[_Union[TaskKey, _Mapping]] = ..., checkpoint: _Optional[_Union[Checkpoint, _Mapping]] = ...) -> None: ...

class Done(_message.Message):
    __slots__ = ("key", "outputs", "timing", "warnings")
    class OutputsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: _tensor_pb2.Value
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[_tensor_pb2.Value, _Mapping]] = ...) -> None: ...
    KEY_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    key: TaskKey
    outputs: _containers.MessageMap[str, _tensor_pb2.Value]
    timing: Timing
    warnings: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, key: _Optional[_Union[TaskKey, _Mapping]] = ..., outputs: _Optional[_Mapping[str, _tensor_pb2.Value]] = ..., timing: _Optional[_Union[Timing, _Mapping]] = ..., warnings: _Optional[_Iterable[str]] = ...) -> None: ...

class Timing(_message.Message):
    __slots__ = ("queue_seconds", "fetch_seconds", "run_seconds", "steps_run", "steps_helped", "helper_wait_seconds")
    QUEUE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    FETCH_SECONDS_FIELD_NUMBER: _ClassVar[int]
    RUN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    STEPS_RUN_FIELD_NUMBER: _ClassVar[int]
    STEPS_HELPED_FIELD_NUMBER: _ClassVar[int]
    HELPER_WAIT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    queue_seconds: float
    fetch_seconds: float
    run_seconds: float
    steps_run: int
    steps_helped: int
    helper_wait_seconds: float
    def __init__(self, queue_seconds: _Optional[float] = ..., fetch_seconds: _Optional[float] = ..., run_seconds: _Optional[float] = ..., steps_run: _Optional[int] = ..., steps_helped: _Optional[int] = ..., helper_wait_seconds: _Optional[float] = ...) -> None: ...

class Yielded(_message.Message):
    __slots__ = ("key", "checkpoint")
    KEY_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    key: TaskKey
    checkpoint: Checkpoint
    def __init__(self, key: _Optional[_Union[TaskKey, _Mapping]] = ..., checkpoint: _Optional[_Union[Checkpoint, _Mapping]] = ...) -> None: ...

class Failed(_message.Message):
    __slots__ = ("key", "reason", "message", "lost_tensors", "field")
    KEY_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    LOST_TENSORS_FIELD_NUMBER: _ClassVar[int]
    FIELD_FIELD_NUMBER: _ClassVar[int]
    key: TaskKey
    reason: FailureReason
    message: str
    lost_tensors: _containers.RepeatedScalarFieldContainer[str]
    field: str
    def __init__(self, key: _Optional[_Union[TaskKey, _Mapping]] = ..., reason: _Optional[_Union[FailureReason, str]] = ..., message: _Optional[str] = ..., lost_tensors: _Optional[_Iterable[str]] = ..., field: _Optional[str] = ...) -> None: ...

class LoadReport(_message.Message):
    __slots__ = ("queued", "running", "queued_seconds", "memory_used", "memory_limit", "draining", "resident", "tensor_bytes", "tensors", "residency_generation", "gateways", "helping")
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    QUEUED_SECONDS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_USED_FIELD_NUMBER: _ClassVar[int]
    MEMORY_LIMIT_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_FIELD_NUMBER: _ClassVar[int]
    TENSOR_BYTES_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    RESIDENCY_GENERATION_FIELD_NUMBER: _ClassVar[int]
    GATEWAYS_FIELD_NUMBER: _ClassVar[int]
    HELPING_FIELD_NUMBER: _ClassVar[int]
    queued: int
    running: int
    queued_seconds: float
    memory_used: int
    memory_limit: int
    draining: bool
    resident: _containers.RepeatedScalarFieldContainer[str]
    tensor_bytes: int
    tensors: int
    residency_generation: int
    gateways: int
    helping: int
    def __init__(self, queued: _Optional[int] = ..., running: _Optional[int] = ..., queued_seconds: _Optional[float] = ..., memory_used: _Optional[int] = ..., memory_limit: _Optional[int] = ..., draining: _Optional[bool] = ..., resident: _Optional[_Iterable[str]] = ..., tensor_bytes: _Optional[int] = ..., tensors: _Optional[int] = ..., residency_generation: _Optional[int] = ..., gateways: _Optional[int] = ..., helping: _Optional[int] = ...) -> None: ...

class ModelSpec(_message.Message):
    __slots__ = ("identity", "family", "component", "uri", "revision", "subfolder", "variant", "dtype", "class_name", "options", "loras")
    class OptionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    FAMILY_FIELD_NUMBER: _ClassVar[int]
    COMPONENT_FIELD_NUMBER: _ClassVar[int]
    URI_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    SUBFOLDER_FIELD_NUMBER: _ClassVar[int]
    VARIANT_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    CLASS_NAME_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    LORAS_FIELD_NUMBER: _ClassVar[int]
    identity: str
    family: str
    component: str
    uri: str
    revision: str
    subfolder: str
    variant: str
    dtype: str
    class_name: str
    options: _containers.ScalarMap[str, str]
    loras: _containers.RepeatedCompositeFieldContainer[LoraUse]
    def __init__(self, identity: _Optional[str] = ..., family: _Optional[str] = ..., component: _Optional[str] = ..., uri: _Optional[str] = ..., revision: _Optional[str] = ..., subfolder: _Optional[str] = ..., variant: _Optional[str] = ..., dtype: _Optional[str] = ..., class_name: _Optional[str] = ..., options: _Optional[_Mapping[str, str]] = ..., loras: _Optional[_Iterable[_Union[LoraUse, _Mapping]]] = ...) -> None: ...

class SetResidencyRequest(_message.Message):
    __slots__ = ("generation", "planner", "models")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    PLANNER_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    generation: int
    planner: str
    models: _containers.RepeatedCompositeFieldContainer[ModelSpec]
    def __init__(self, generation: _Optional[int] = ..., planner: _Optional[str] = ..., models: _Optional[_Iterable[_Union[ModelSpec, _Mapping]]] = ...) -> None: ...

class SetResidencyResponse(_message.Message):
    __slots__ = ("generation", "models")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    generation: int
    models: _containers.RepeatedCompositeFieldContainer[ModelStatus]
    def __init__(self, generation: _Optional[int] = ..., models: _Optional[_Iterable[_Union[ModelStatus, _Mapping]]] = ...) -> None: ...

class ModelStatus(_message.Message):
    __slots__ = ("identity", "state", "reason", "message", "nbytes", "digest", "load_seconds", "facts", "stages", "downloaded_bytes", "total_bytes", "tasks", "needed_by")
    class FactsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: _tensor_pb2.Value
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[_tensor_pb2.Value, _Mapping]] = ...) -> None: ...
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    LOAD_SECONDS_FIELD_NUMBER: _ClassVar[int]
    FACTS_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    DOWNLOADED_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    NEEDED_BY_FIELD_NUMBER: _ClassVar[int]
    identity: str
    state: ModelState
    reason: str
    message: str
    nbytes: int
    digest: str
    load_seconds: float
    facts: _containers.MessageMap[str, _tensor_pb2.Value]
    stages: _containers.RepeatedScalarFieldContainer[str]
    downloaded_bytes: int
    total_bytes: int
    tasks: int
    needed_by: int
    def __init__(self, identity: _Optional[str] = ..., state: _Optional[_Union[ModelState, str]] = ..., reason: _Optional[str] = ..., message: _Optional[str] = ..., nbytes: _Optional[int] = ..., digest: _Optional[str] = ..., load_seconds: _Optional[float] = ..., facts: _Optional[_Mapping[str, _tensor_pb2.Value]] = ..., stages: _Optional[_Iterable[str]] = ..., downloaded_bytes: _Optional[int] = ..., total_bytes: _Optional[int] = ..., tasks: _Optional[int] = ..., needed_by: _Optional[int] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeResponse(_message.Message):
    __slots__ = ("node_id", "incarnation", "address", "host_id", "device", "fingerprint", "memory_limit", "models", "residency_generation", "load", "protocol", "version")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    HOST_ID_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    MEMORY_LIMIT_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    RESIDENCY_GENERATION_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    incarnation: str
    address: str
    host_id: str
    device: str
    fingerprint: str
    memory_limit: int
    models: _containers.RepeatedCompositeFieldContainer[ModelStatus]
    residency_generation: int
    load: LoadReport
    protocol: ProtocolRange
    version: str
    def __init__(self, node_id: _Optional[str] = ..., incarnation: _Optional[str] = ..., address: _Optional[str] = ..., host_id: _Optional[str] = ..., device: _Optional[str] = ..., fingerprint: _Optional[str] = ..., memory_limit: _Optional[int] = ..., models: _Optional[_Iterable[_Union[ModelStatus, _Mapping]]] = ..., residency_generation: _Optional[int] = ..., load: _Optional[_Union[LoadReport, _Mapping]] = ..., protocol: _Optional[_Union[ProtocolRange, _Mapping]] = ..., version: _Optional[str] = ...) -> None: ...

class AssistRequest(_message.Message):
    __slots__ = ("open", "step", "close")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    CLOSE_FIELD_NUMBER: _ClassVar[int]
    open: AssistOpen
    step: AssistStep
    close: AssistClose
    def __init__(self, open: _Optional[_Union[AssistOpen, _Mapping]] = ..., step: _Optional[_Union[AssistStep, _Mapping]] = ..., close: _Optional[_Union[AssistClose, _Mapping]] = ...) -> None: ...

class AssistOpen(_message.Message):
    __slots__ = ("key", "helper", "inputs", "loras", "numerics", "protocol", "tenant", "weight", "priority", "remaining_ms", "traceparent")
    class InputsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: _tensor_pb2.Value
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[_tensor_pb2.Value, _Mapping]] = ...) -> None: ...
    KEY_FIELD_NUMBER: _ClassVar[int]
    HELPER_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    LORAS_FIELD_NUMBER: _ClassVar[int]
    NUMERICS_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    REMAINING_MS_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    key: TaskKey
    helper: Helper
    inputs: _containers.MessageMap[str, _tensor_pb2.Value]
    loras: _containers.RepeatedCompositeFieldContainer[LoraUse]
    numerics: Numerics
    protocol: ProtocolRange
    tenant: str
    weight: float
    priority: int
    remaining_ms: int
    traceparent: str
    def __init__(self, key: _Optional[_Union[TaskKey, _Mapping]] = ..., helper: _Optional[_Union[Helper, _Mapping]] = ..., inputs: _Optional[_Mapping[str, _tensor_pb2.Value]] = ..., loras: _Optional[_Iterable[_Union[LoraUse, _Mapping]]] = ..., numerics: _Optional[_Union[Numerics, str]] = ..., protocol: _Optional[_Union[ProtocolRange, _Mapping]] = ..., tenant: _Optional[str] = ..., weight: _Optional[float] = ..., priority: _Optional[int] = ..., remaining_ms: _Optional[int] = ..., traceparent: _Optional[str] = ...) -> None: ...

class AssistStep(_message.Message):
    __slots__ = ("step", "timestep", "latents", "scale")
    STEP_FIELD_NUMBER: _ClassVar[int]
    TIMESTEP_FIELD_NUMBER: _ClassVar[int]
    LATENTS_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    step: int
    timestep: float
    latents: _tensor_pb2.TensorRef
    scale: float
    def __init__(self, step: _Optional[int] = ..., timestep: _Optional[float] = ..., latents: _Optional[_Union[_tensor_pb2.TensorRef, _Mapping]] = ..., scale: _Optional[float] = ...) -> None: ...

class AssistClose(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AssistResponse(_message.Message):
    __slots__ = ("opened", "output", "failed")
    OPENED_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    opened: AssistOpened
    output: AssistOutput
    failed: Failed
    def __init__(self, opened: _Optional[_Union[AssistOpened, _Mapping]] = ..., output: _Optional[_Union[AssistOutput, _Mapping]] = ..., failed: _Optional[_Union[Failed, _Mapping]] = ...) -> None: ...

class AssistOpened(_message.Message):
    __slots__ = ("fingerprint",)
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    fingerprint: str
    def __init__(self, fingerprint: _Optional[str] = ...) -> None: ...

class AssistOutput(_message.Message):
    __slots__ = ("step", "index", "count", "tensor")
    STEP_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    step: int
    index: int
    count: int
    tensor: _tensor_pb2.TensorRef
    def __init__(self, step: _Optional[int] = ..., index: _Optional[int] = ..., count: _Optional[int] = ..., tensor: _Optional[_Union[_tensor_pb2.TensorRef, _Mapping]] = ...) -> None: ...
