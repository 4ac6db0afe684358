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
    REPLICA_STATE_STALLED: _ClassVar[ReplicaState]
REPLICA_STATE_UNSPECIFIED: ReplicaState
REPLICA_STATE_STARTING: ReplicaState
REPLICA_STATE_READY: ReplicaState
REPLICA_STATE_DRAINING: ReplicaState
REPLICA_STATE_LOST: ReplicaState
REPLICA_STATE_STALLED: ReplicaState

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CacheStatus(_message.Message):
    __slots__ = ("blocks_total", "blocks_in_use", "blocks_cached", "block_tokens", "bytes_total", "hit_tokens", "queried_tokens", "preemptions", "host_hit_tokens", "store_hit_tokens", "host_loaded_bytes", "host_load_seconds", "store_loaded_bytes", "store_load_seconds", "store_loads_given_up", "store_writes_dropped")
    BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_IN_USE_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_CACHED_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BYTES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    HIT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUERIED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    HOST_HIT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STORE_HIT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    HOST_LOADED_BYTES_FIELD_NUMBER: _ClassVar[int]
    HOST_LOAD_SECONDS_FIELD_NUMBER: _ClassVar[int]
    STORE_LOADED_BYTES_FIELD_NUMBER: _ClassVar[int]
    STORE_LOAD_SECONDS_FIELD_NUMBER: _ClassVar[int]
    STORE_LOADS_GIVEN_UP_FIELD_NUMBER: _ClassVar[int]
    STORE_WRITES_DROPPED_FIELD_NUMBER: _ClassVar[int]
    blocks_total: int
    blocks_in_use: int
    blocks_cached: int
    block_tokens: int
    bytes_total: int
    hit_tokens: int
    queried_tokens: int
    preemptions: int
    host_hit_tokens: int
    store_hit_tokens: int
    host_loaded_bytes: int
    host_load_seconds: float
    store_loaded_bytes: int
    store_load_seconds: float
    store_loads_given_up: int
    store_writes_dropped: int
    def __init__(self, blocks_total: _Optional[int] = ..., blocks_in_use: _Optional[int] = ..., blocks_cached: _Optional[int] = ..., block_tokens: _Optional[int] = ..., bytes_total: _Optional[int] = ..., hit_tokens: _Optional[int] = ..., queried_tokens: _Optional[int] = ..., preemptions: _Optional[int] = ..., host_hit_tokens: _Optional[int] = ..., store_hit_tokens: _Optional[int] = ..., host_loaded_bytes: _Optional[int] = ..., host_load_seconds: _Optional[float] = ..., store_loaded_bytes: _Optional[int] = ..., store_load_seconds: _Optional[float] = ..., store_loads_given_up: _Optional[int] = ..., store_writes_dropped: _Optional[int] = ...) -> None: ...

class Replica(_message.Message):
    __slots__ = ("id", "model", "state", "node", "epoch", "running", "waiting", "generated_tokens", "cache", "cause", "drafted_tokens", "accepted_tokens", "prefill_rate", "cold_start")
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
    PREFILL_RATE_FIELD_NUMBER: _ClassVar[int]
    COLD_START_FIELD_NUMBER: _ClassVar[int]
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
    prefill_rate: float
    cold_start: ColdStart
    def __init__(self, id: _Optional[str] = ..., model: _Optional[str] = ..., state: _Optional[_Union[ReplicaState, str]] = ..., node: _Optional[str] = ..., epoch: _Optional[int] = ..., running: _Optional[int] = ..., waiting: _Optional[int] = ..., generated_tokens: _Optional[int] = ..., cache: _Optional[_Union[CacheStatus, _Mapping]] = ..., cause: _Optional[str] = ..., drafted_tokens: _Optional[int] = ..., accepted_tokens: _Optional[int] = ..., prefill_rate: _Optional[float] = ..., cold_start: _Optional[_Union[ColdStart, _Mapping]] = ...) -> None: ...

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
    __slots__ = ("name", "model_fingerprint", "numerics_id", "replicas_ready", "replicas_wanted", "replicas_least", "replicas_most", "versions", "scaling")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    NUMERICS_ID_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_READY_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_WANTED_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_LEAST_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_MOST_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    SCALING_FIELD_NUMBER: _ClassVar[int]
    name: str
    model_fingerprint: str
    numerics_id: str
    replicas_ready: int
    replicas_wanted: int
    replicas_least: int
    replicas_most: int
    versions: int
    scaling: Scaling
    def __init__(self, name: _Optional[str] = ..., model_fingerprint: _Optional[str] = ..., numerics_id: _Optional[str] = ..., replicas_ready: _Optional[int] = ..., replicas_wanted: _Optional[int] = ..., replicas_least: _Optional[int] = ..., replicas_most: _Optional[int] = ..., versions: _Optional[int] = ..., scaling: _Optional[_Union[Scaling, _Mapping]] = ...) -> None: ...

class Scaling(_message.Message):
    __slots__ = ("reason", "detail", "age_s")
    REASON_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    reason: str
    detail: str
    age_s: float
    def __init__(self, reason: _Optional[str] = ..., detail: _Optional[str] = ..., age_s: _Optional[float] = ...) -> None: ...

class ColdStart(_message.Message):
    __slots__ = ("process_s", "imports_s", "weights_s", "engine_s", "warm_up_s")
    PROCESS_S_FIELD_NUMBER: _ClassVar[int]
    IMPORTS_S_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_S_FIELD_NUMBER: _ClassVar[int]
    ENGINE_S_FIELD_NUMBER: _ClassVar[int]
    WARM_UP_S_FIELD_NUMBER: _ClassVar[int]
    process_s: float
    imports_s: float
    weights_s: float
    engine_s: float
    warm_up_s: float
    def __init__(self, process_s: _Optional[float] = ..., imports_s: _Optional[float] = ..., weights_s: _Optional[float] = ..., engine_s: _Optional[float] = ..., warm_up_s: _Optional[float] = ...) -> None: ...

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

class RouterStatus(_message.Message):
    __slots__ = ("decisions", "refused", "reused_tokens", "leases", "index")
    class DecisionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class ReusedTokensEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    DECISIONS_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    REUSED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    decisions: _containers.ScalarMap[str, int]
    refused: int
    reused_tokens: _containers.ScalarMap[str, int]
    leases: int
    index: PrefixIndexStatus
    def __init__(self, decisions: _Optional[_Mapping[str, int]] = ..., refused: _Optional[int] = ..., reused_tokens: _Optional[_Mapping[str, int]] = ..., leases: _Optional[int] = ..., index: _Optional[_Union[PrefixIndexStatus, _Mapping]] = ...) -> None: ...

class PrefixIndexStatus(_message.Message):
    __slots__ = ("blocks", "stored_blocks", "expected_blocks", "holder_sets", "bytes", "changes", "gaps", "snapshots", "refused_blocks")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    STORED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HOLDER_SETS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    CHANGES_FIELD_NUMBER: _ClassVar[int]
    GAPS_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOTS_FIELD_NUMBER: _ClassVar[int]
    REFUSED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    stored_blocks: int
    expected_blocks: int
    holder_sets: int
    bytes: int
    changes: int
    gaps: int
    snapshots: int
    refused_blocks: int
    def __init__(self, blocks: _Optional[int] = ..., stored_blocks: _Optional[int] = ..., expected_blocks: _Optional[int] = ..., holder_sets: _Optional[int] = ..., bytes: _Optional[int] = ..., changes: _Optional[int] = ..., gaps: _Optional[int] = ..., snapshots: _Optional[int] = ..., refused_blocks: _Optional[int] = ...) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("version", "models", "replicas", "processes", "uptime_s", "experts", "router")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    PROCESSES_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    ROUTER_FIELD_NUMBER: _ClassVar[int]
    version: str
    models: _containers.RepeatedCompositeFieldContainer[ModelStatus]
    replicas: _containers.RepeatedCompositeFieldContainer[Replica]
    processes: _containers.RepeatedCompositeFieldContainer[Process]
    uptime_s: float
    experts: _containers.RepeatedCompositeFieldContainer[ExpertPlacement]
    router: RouterStatus
    def __init__(self, version: _Optional[str] = ..., models: _Optional[_Iterable[_Union[ModelStatus, _Mapping]]] = ..., replicas: _Optional[_Iterable[_Union[Replica, _Mapping]]] = ..., processes: _Optional[_Iterable[_Union[Process, _Mapping]]] = ..., uptime_s: _Optional[float] = ..., experts: _Optional[_Iterable[_Union[ExpertPlacement, _Mapping]]] = ..., router: _Optional[_Union[RouterStatus, _Mapping]] = ...) -> None: ...
