from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ReplicaState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REPLICA_STATE_UNSPECIFIED: _ClassVar[ReplicaState]
    REPLICA_STATE_STARTING: _ClassVar[ReplicaState]
    REPLICA_STATE_READY: _ClassVar[ReplicaState]
    REPLICA_STATE_DRAINING: _ClassVar[ReplicaState]
    REPLICA_STATE_LOST: _ClassVar[ReplicaState]
REPLICA_STATE_UNSPECIFIED: ReplicaState
REPLICA_STATE_STARTING: ReplicaState
REPLICA_STATE_READY: ReplicaState
REPLICA_STATE_DRAINING: ReplicaState
REPLICA_STATE_LOST: ReplicaState

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CacheStatus(_message.Message):
    __slots__ = ("blocks_total", "blocks_in_use", "blocks_cached", "block_tokens", "bytes_total", "hit_tokens", "queried_tokens", "preemptions")
    BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_IN_USE_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_CACHED_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BYTES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    HIT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUERIED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    blocks_total: int
    blocks_in_use: int
    blocks_cached: int
    block_tokens: int
    bytes_total: int
    hit_tokens: int
    queried_tokens: int
    preemptions: int
    def __init__(self, blocks_total: _Optional[int] = ..., blocks_in_use: _Optional[int] = ..., blocks_cached: _Optional[int] = ..., block_tokens: _Optional[int] = ..., bytes_total: _Optional[int] = ..., hit_tokens: _Optional[int] = ..., queried_tokens: _Optional[int] = ..., preemptions: _Optional[int] = ...) -> None: ...

class Replica(_message.Message):
    __slots__ = ("id", "model", "state", "node", "epoch", "running", "waiting", "generated_tokens", "cache", "cause", "drafted_tokens", "accepted_tokens")
    ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHE_FIELD_NUMBER: _ClassVar[int]
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    DRAFTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    id: str
    model: str
    state: ReplicaState
    node: str
    epoch: int
    running: int
    waiting: int
    generated_tokens: int
    cache: CacheStatus
    cause: str
    drafted_tokens: int
    accepted_tokens: int
    def __init__(self, id: _Optional[str] = ..., model: _Optional[str] = ..., state: _Optional[_Union[ReplicaState, str]] = ..., node: _Optional[str] = ..., epoch: _Optional[int] = ..., running: _Optional[int] = ..., waiting: _Optional[int] = ..., generated_tokens: _Optional[int] = ..., cache: _Optional[_Union[CacheStatus, _Mapping]] = ..., cause: _Optional[str] = ..., drafted_tokens: _Optional[int] = ..., accepted_tokens: _Optional[int] = ...) -> None: ...

class Process(_message.Message):
    __slots__ = ("role", "pid", "node", "replica", "rank")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    role: str
    pid: int
    node: str
    replica: str
    rank: int
    def __init__(self, role: _Optional[str] = ..., pid: _Optional[int] = ..., node: _Optional[str] = ..., replica: _Optional[str] = ..., rank: _Optional[int] = ...) -> None: ...

class ModelStatus(_message.Message):
    __slots__ = ("name", "model_fingerprint", "numerics_id", "replicas_ready", "replicas_wanted")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    NUMERICS_ID_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_READY_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_WANTED_FIELD_NUMBER: _ClassVar[int]
    name: str
    model_fingerprint: str
    numerics_id: str
    replicas_ready: int
    replicas_wanted: int
    def __init__(self, name: _Optional[str] = ..., model_fingerprint: _Optional[str] = ..., numerics_id: _Optional[str] = ..., replicas_ready: _Optional[int] = ..., replicas_wanted: _Optional[int] = ...) -> None: ...

class ExpertHost(_message.Message):
    __slots__ = ("name", "life", "state", "node", "pid", "held", "capacity", "rows")
    NAME_FIELD_NUMBER: _ClassVar[int]
    LIFE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    name: str
    life: int
    state: str
    node: str
    pid: int
    held: int
    capacity: int
    rows: int
    def __init__(self, name: _Optional[str] = ..., life: _Optional[int] = ..., state: _Optional[str] = ..., node: _Optional[str] = ..., pid: _Optional[int] = ..., held: _Optional[int] = ..., capacity: _Optional[int] = ..., rows: _Optional[int] = ...) -> None: ...

class ExpertPlacement(_message.Message):
    __slots__ = ("model", "replica", "version", "target_version", "balance", "age_s", "experts", "copies", "hosts", "hosts_wanted", "problem")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TARGET_VERSION_FIELD_NUMBER: _ClassVar[int]
    BALANCE_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    COPIES_FIELD_NUMBER: _ClassVar[int]
    HOSTS_FIELD_NUMBER: _ClassVar[int]
    HOSTS_WANTED_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    model: str
    replica: str
    version: int
    target_version: int
    balance: float
    age_s: float
    experts: int
    copies: int
    hosts: _containers.RepeatedCompositeFieldContainer[ExpertHost]
    hosts_wanted: int
    problem: str
    def __init__(self, model: _Optional[str] = ..., replica: _Optional[str] = ..., version: _Optional[int] = ..., target_version: _Optional[int] = ..., balance: _Optional[float] = ..., age_s: _Optional[float] = ..., experts: _Optional[int] = ..., copies: _Optional[int] = ..., hosts: _Optional[_Iterable[_Union[ExpertHost, _Mapping]]] = ..., hosts_wanted: _Optional[int] = ..., problem: _Optional[str] = ...) -> None: ...

class ScaleExpertsRequest(_message.Message):
    __slots__ = ("model", "hosts")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    HOSTS_FIELD_NUMBER: _ClassVar[int]
    model: str
    hosts: int
    def __init__(self, model: _Optional[str] = ..., hosts: _Optional[int] = ...) -> None: ...

class ScaleExpertsResponse(_message.Message):
    __slots__ = ("model", "hosts")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    HOSTS_FIELD_NUMBER: _ClassVar[int]
    model: str
    hosts: int
    def __init__(self, model: _Optional[str] = ..., hosts: _Optional[int] = ...) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("version", "models", "replicas", "processes", "uptime_s", "experts")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    PROCESSES_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    version: str
    models: _containers.RepeatedCompositeFieldContainer[ModelStatus]
    replicas: _containers.RepeatedCompositeFieldContainer[Replica]
    processes: _containers.RepeatedCompositeFieldContainer[Process]
    uptime_s: float
    experts: _containers.RepeatedCompositeFieldContainer[ExpertPlacement]
    def __init__(self, version: _Optional[str] = ..., models: _Optional[_Iterable[_Union[ModelStatus, _Mapping]]] = ..., replicas: _Optional[_Iterable[_Union[Replica, _Mapping]]] = ..., processes: _Optional[_Iterable[_Union[Process, _Mapping]]] = ..., uptime_s: _Optional[float] = ..., experts: _Optional[_Iterable[_Union[ExpertPlacement, _Mapping]]] = ...) -> None: ...
