from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SessionRequest(_message.Message):
    __slots__ = ("message",)
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    message: WorkerMessage
    def __init__(self, message: _Optional[_Union[WorkerMessage, _Mapping]] = ...) -> None: ...

class SessionResponse(_message.Message):
    __slots__ = ("opened", "message")
    OPENED_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    opened: SessionOpened
    message: CoordinatorMessage
    def __init__(self, opened: _Optional[_Union[SessionOpened, _Mapping]] = ..., message: _Optional[_Union[CoordinatorMessage, _Mapping]] = ...) -> None: ...

class SessionOpened(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    def __init__(self, session: _Optional[bytes] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ("padding", "echo")
    PADDING_FIELD_NUMBER: _ClassVar[int]
    ECHO_FIELD_NUMBER: _ClassVar[int]
    padding: bytes
    echo: int
    def __init__(self, padding: _Optional[bytes] = ..., echo: _Optional[int] = ...) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("json", "echo", "time")
    JSON_FIELD_NUMBER: _ClassVar[int]
    ECHO_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    json: str
    echo: bytes
    time: float
    def __init__(self, json: _Optional[str] = ..., echo: _Optional[bytes] = ..., time: _Optional[float] = ...) -> None: ...

class WorkerMessage(_message.Message):
    __slots__ = ("join", "heartbeat", "contribution", "initial", "skip", "fetch", "leave", "vote", "lease_request")
    JOIN_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTION_FIELD_NUMBER: _ClassVar[int]
    INITIAL_FIELD_NUMBER: _ClassVar[int]
    SKIP_FIELD_NUMBER: _ClassVar[int]
    FETCH_FIELD_NUMBER: _ClassVar[int]
    LEAVE_FIELD_NUMBER: _ClassVar[int]
    VOTE_FIELD_NUMBER: _ClassVar[int]
    LEASE_REQUEST_FIELD_NUMBER: _ClassVar[int]
    join: Join
    heartbeat: Heartbeat
    contribution: Contribution
    initial: Initial
    skip: Skip
    fetch: Fetch
    leave: Leave
    vote: Vote
    lease_request: LeaseRequest
    def __init__(self, join: _Optional[_Union[Join, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., contribution: _Optional[_Union[Contribution, _Mapping]] = ..., initial: _Optional[_Union[Initial, _Mapping]] = ..., skip: _Optional[_Union[Skip, _Mapping]] = ..., fetch: _Optional[_Union[Fetch, _Mapping]] = ..., leave: _Optional[_Union[Leave, _Mapping]] = ..., vote: _Optional[_Union[Vote, _Mapping]] = ..., lease_request: _Optional[_Union[LeaseRequest, _Mapping]] = ...) -> None: ...

class CoordinatorMessage(_message.Message):
    __slots__ = ("waiting", "welcome", "refused", "commit", "rejected", "aborted", "resend", "snapshot", "claim", "lease")
    WAITING_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    ABORTED_FIELD_NUMBER: _ClassVar[int]
    RESEND_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    CLAIM_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    waiting: Waiting
    welcome: Welcome
    refused: Refused
    commit: Commit
    rejected: Rejected
    aborted: Aborted
    resend: Resend
    snapshot: Snapshot
    claim: Claim
    lease: Lease
    def __init__(self, waiting: _Optional[_Union[Waiting, _Mapping]] = ..., welcome: _Optional[_Union[Welcome, _Mapping]] = ..., refused: _Optional[_Union[Refused, _Mapping]] = ..., commit: _Optional[_Union[Commit, _Mapping]] = ..., rejected: _Optional[_Union[Rejected, _Mapping]] = ..., aborted: _Optional[_Union[Aborted, _Mapping]] = ..., resend: _Optional[_Union[Resend, _Mapping]] = ..., snapshot: _Optional[_Union[Snapshot, _Mapping]] = ..., claim: _Optional[_Union[Claim, _Mapping]] = ..., lease: _Optional[_Union[Lease, _Mapping]] = ...) -> None: ...

class ObjectRef(_message.Message):
    __slots__ = ("key", "length", "crc32c")
    KEY_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    CRC32C_FIELD_NUMBER: _ClassVar[int]
    key: str
    length: int
    crc32c: int
    def __init__(self, key: _Optional[str] = ..., length: _Optional[int] = ..., crc32c: _Optional[int] = ...) -> None: ...

class IndexedObject(_message.Message):
    __slots__ = ("index", "object")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    OBJECT_FIELD_NUMBER: _ClassVar[int]
    index: int
    object: ObjectRef
    def __init__(self, index: _Optional[int] = ..., object: _Optional[_Union[ObjectRef, _Mapping]] = ...) -> None: ...

class IndexedWeight(_message.Message):
    __slots__ = ("index", "weight")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    index: int
    weight: float
    def __init__(self, index: _Optional[int] = ..., weight: _Optional[float] = ...) -> None: ...

class IndexedRound(_message.Message):
    __slots__ = ("index", "round")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    index: int
    round: int
    def __init__(self, index: _Optional[int] = ..., round: _Optional[int] = ...) -> None: ...

class FragmentRound(_message.Message):
    __slots__ = ("fragment", "round")
    FRAGMENT_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    fragment: int
    round: int
    def __init__(self, fragment: _Optional[int] = ..., round: _Optional[int] = ...) -> None: ...

class BlockRange(_message.Message):
    __slots__ = ("shard", "lo", "hi")
    SHARD_FIELD_NUMBER: _ClassVar[int]
    LO_FIELD_NUMBER: _ClassVar[int]
    HI_FIELD_NUMBER: _ClassVar[int]
    shard: int
    lo: int
    hi: int
    def __init__(self, shard: _Optional[int] = ..., lo: _Optional[int] = ..., hi: _Optional[int] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("step", "tokens", "loss", "lr", "tokens_per_s", "compute_s", "exposed_s", "hidden_s", "bytes_up", "bytes_down", "eval_start", "eval_end", "steps_per_s", "link_up_bps", "link_down_bps", "rtt_s", "peak_up_bps", "peak_down_bps")
    STEP_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    LR_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    EXPOSED_S_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_S_FIELD_NUMBER: _ClassVar[int]
    BYTES_UP_FIELD_NUMBER: _ClassVar[int]
    BYTES_DOWN_FIELD_NUMBER: _ClassVar[int]
    EVAL_START_FIELD_NUMBER: _ClassVar[int]
    EVAL_END_FIELD_NUMBER: _ClassVar[int]
    STEPS_PER_S_FIELD_NUMBER: _ClassVar[int]
    LINK_UP_BPS_FIELD_NUMBER: _ClassVar[int]
    LINK_DOWN_BPS_FIELD_NUMBER: _ClassVar[int]
    RTT_S_FIELD_NUMBER: _ClassVar[int]
    PEAK_UP_BPS_FIELD_NUMBER: _ClassVar[int]
    PEAK_DOWN_BPS_FIELD_NUMBER: _ClassVar[int]
    step: int
    tokens: int
    loss: float
    lr: float
    tokens_per_s: float
    compute_s: float
    exposed_s: float
    hidden_s: float
    bytes_up: int
    bytes_down: int
    eval_start: float
    eval_end: float
    steps_per_s: float
    link_up_bps: float
    link_down_bps: float
    rtt_s: float
    peak_up_bps: float
    peak_down_bps: float
    def __init__(self, step: _Optional[int] = ..., tokens: _Optional[int] = ..., loss: _Optional[float] = ..., lr: _Optional[float] = ..., tokens_per_s: _Optional[float] = ..., compute_s: _Optional[float] = ..., exposed_s: _Optional[float] = ..., hidden_s: _Optional[float] = ..., bytes_up: _Optional[int] = ..., bytes_down: _Optional[int] = ..., eval_start: _Optional[float] = ..., eval_end: _Optional[float] = ..., steps_per_s: _Optional[float] = ..., link_up_bps: _Optional[float] = ..., link_down_bps: _Optional[float] = ..., rtt_s: _Optional[float] = ..., peak_up_bps: _Optional[float] = ..., peak_down_bps: _Optional[float] = ...) -> None: ...

class Join(_message.Message):
    __slots__ = ("worker", "nonce", "run_id", "plan", "settings", "versions", "step", "protocol", "epoch")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    worker: str
    nonce: int
    run_id: str
    plan: str
    settings: str
    versions: _containers.RepeatedScalarFieldContainer[int]
    step: int
    protocol: int
    epoch: int
    def __init__(self, worker: _Optional[str] = ..., nonce: _Optional[int] = ..., run_id: _Optional[str] = ..., plan: _Optional[str] = ..., settings: _Optional[str] = ..., versions: _Optional[_Iterable[int]] = ..., step: _Optional[int] = ..., protocol: _Optional[int] = ..., epoch: _Optional[int] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("worker", "incarnation", "progress", "versions", "in_flight")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    worker: str
    incarnation: int
    progress: Progress
    versions: _containers.RepeatedScalarFieldContainer[int]
    in_flight: _containers.RepeatedCompositeFieldContainer[FragmentRound]
    def __init__(self, worker: _Optional[str] = ..., incarnation: _Optional[int] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ..., versions: _Optional[_Iterable[int]] = ..., in_flight: _Optional[_Iterable[_Union[FragmentRound, _Mapping]]] = ...) -> None: ...

class Contribution(_message.Message):
    __slots__ = ("worker", "incarnation", "fragment", "round", "frame", "shard", "ranges")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    FRAGMENT_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    FRAME_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    RANGES_FIELD_NUMBER: _ClassVar[int]
    worker: str
    incarnation: int
    fragment: int
    round: int
    frame: ObjectRef
    shard: int
    ranges: _containers.RepeatedCompositeFieldContainer[BlockRange]
    def __init__(self, worker: _Optional[str] = ..., incarnation: _Optional[int] = ..., fragment: _Optional[int] = ..., round: _Optional[int] = ..., frame: _Optional[_Union[ObjectRef, _Mapping]] = ..., shard: _Optional[int] = ..., ranges: _Optional[_Iterable[_Union[BlockRange, _Mapping]]] = ...) -> None: ...

class Initial(_message.Message):
    __slots__ = ("worker", "incarnation", "fragment", "frame")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    FRAGMENT_FIELD_NUMBER: _ClassVar[int]
    FRAME_FIELD_NUMBER: _ClassVar[int]
    worker: str
    incarnation: int
    fragment: int
    frame: ObjectRef
    def __init__(self, worker: _Optional[str] = ..., incarnation: _Optional[int] = ..., fragment: _Optional[int] = ..., frame: _Optional[_Union[ObjectRef, _Mapping]] = ...) -> None: ...

class Skip(_message.Message):
    __slots__ = ("worker", "incarnation", "fragment", "round", "reason")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    FRAGMENT_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    worker: str
    incarnation: int
    fragment: int
    round: int
    reason: str
    def __init__(self, worker: _Optional[str] = ..., incarnation: _Optional[int] = ..., fragment: _Optional[int] = ..., round: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class Fetch(_message.Message):
    __slots__ = ("worker", "incarnation", "fragment", "differs")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    FRAGMENT_FIELD_NUMBER: _ClassVar[int]
    DIFFERS_FIELD_NUMBER: _ClassVar[int]
    worker: str
    incarnation: int
    fragment: int
    differs: str
    def __init__(self, worker: _Optional[str] = ..., incarnation: _Optional[int] = ..., fragment: _Optional[int] = ..., differs: _Optional[str] = ...) -> None: ...

class Leave(_message.Message):
    __slots__ = ("worker", "incarnation", "reason", "progress", "digest", "timeline")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    TIMELINE_FIELD_NUMBER: _ClassVar[int]
    worker: str
    incarnation: int
    reason: str
    progress: Progress
    digest: str
    timeline: str
    def __init__(self, worker: _Optional[str] = ..., incarnation: _Optional[int] = ..., reason: _Optional[str] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ..., digest: _Optional[str] = ..., timeline: _Optional[str] = ...) -> None: ...

class Vote(_message.Message):
    __slots__ = ("worker", "nonce", "attachment", "side")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    ATTACHMENT_FIELD_NUMBER: _ClassVar[int]
    SIDE_FIELD_NUMBER: _ClassVar[int]
    worker: str
    nonce: int
    attachment: str
    side: str
    def __init__(self, worker: _Optional[str] = ..., nonce: _Optional[int] = ..., attachment: _Optional[str] = ..., side: _Optional[str] = ...) -> None: ...

class LeaseRequest(_message.Message):
    __slots__ = ("worker", "incarnation", "number", "want", "kept", "sizes")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    WANT_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    SIZES_FIELD_NUMBER: _ClassVar[int]
    worker: str
    incarnation: int
    number: int
    want: int
    kept: _containers.RepeatedCompositeFieldContainer[BlockRange]
    sizes: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, worker: _Optional[str] = ..., incarnation: _Optional[int] = ..., number: _Optional[int] = ..., want: _Optional[int] = ..., kept: _Optional[_Iterable[_Union[BlockRange, _Mapping]]] = ..., sizes: _Optional[_Iterable[int]] = ...) -> None: ...

class Waiting(_message.Message):
    __slots__ = ("joined", "needed")
    JOINED_FIELD_NUMBER: _ClassVar[int]
    NEEDED_FIELD_NUMBER: _ClassVar[int]
    joined: _containers.RepeatedScalarFieldContainer[str]
    needed: int
    def __init__(self, joined: _Optional[_Iterable[str]] = ..., needed: _Optional[int] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("worker", "incarnation", "index", "members", "epoch", "step", "versions", "initial")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    INITIAL_FIELD_NUMBER: _ClassVar[int]
    worker: str
    incarnation: int
    index: int
    members: int
    epoch: int
    step: int
    versions: _containers.RepeatedScalarFieldContainer[int]
    initial: bool
    def __init__(self, worker: _Optional[str] = ..., incarnation: _Optional[int] = ..., index: _Optional[int] = ..., members: _Optional[int] = ..., epoch: _Optional[int] = ..., step: _Optional[int] = ..., versions: _Optional[_Iterable[int]] = ..., initial: _Optional[bool] = ...) -> None: ...

class Refused(_message.Message):
    __slots__ = ("kind", "reason")
    KIND_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    kind: str
    reason: str
    def __init__(self, kind: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class Commit(_message.Message):
    __slots__ = ("fragment", "version", "weights", "rounds", "digest", "frames", "local_steps")
    FRAGMENT_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    LOCAL_STEPS_FIELD_NUMBER: _ClassVar[int]
    fragment: int
    version: int
    weights: _containers.RepeatedCompositeFieldContainer[IndexedWeight]
    rounds: _containers.RepeatedCompositeFieldContainer[IndexedRound]
    digest: str
    frames: _containers.RepeatedCompositeFieldContainer[IndexedObject]
    local_steps: _containers.RepeatedCompositeFieldContainer[IndexedRound]
    def __init__(self, fragment: _Optional[int] = ..., version: _Optional[int] = ..., weights: _Optional[_Iterable[_Union[IndexedWeight, _Mapping]]] = ..., rounds: _Optional[_Iterable[_Union[IndexedRound, _Mapping]]] = ..., digest: _Optional[str] = ..., frames: _Optional[_Iterable[_Union[IndexedObject, _Mapping]]] = ..., local_steps: _Optional[_Iterable[_Union[IndexedRound, _Mapping]]] = ...) -> None: ...

class Rejected(_message.Message):
    __slots__ = ("fragment", "round", "reason")
    FRAGMENT_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    fragment: int
    round: int
    reason: str
    def __init__(self, fragment: _Optional[int] = ..., round: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class Aborted(_message.Message):
    __slots__ = ("fragment", "round", "reason")
    FRAGMENT_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    fragment: int
    round: int
    reason: str
    def __init__(self, fragment: _Optional[int] = ..., round: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class Resend(_message.Message):
    __slots__ = ("fragment", "round")
    FRAGMENT_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    fragment: int
    round: int
    def __init__(self, fragment: _Optional[int] = ..., round: _Optional[int] = ...) -> None: ...

class Snapshot(_message.Message):
    __slots__ = ("fragment", "version", "digest", "frames", "counted")
    FRAGMENT_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    COUNTED_FIELD_NUMBER: _ClassVar[int]
    fragment: int
    version: int
    digest: str
    frames: _containers.RepeatedCompositeFieldContainer[IndexedObject]
    counted: int
    def __init__(self, fragment: _Optional[int] = ..., version: _Optional[int] = ..., digest: _Optional[str] = ..., frames: _Optional[_Iterable[_Union[IndexedObject, _Mapping]]] = ..., counted: _Optional[int] = ...) -> None: ...

class Claim(_message.Message):
    __slots__ = ("attachment", "side")
    ATTACHMENT_FIELD_NUMBER: _ClassVar[int]
    SIDE_FIELD_NUMBER: _ClassVar[int]
    attachment: str
    side: str
    def __init__(self, attachment: _Optional[str] = ..., side: _Optional[str] = ...) -> None: ...

class Lease(_message.Message):
    __slots__ = ("incarnation", "number", "serial", "ranges")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    SERIAL_FIELD_NUMBER: _ClassVar[int]
    RANGES_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    number: int
    serial: int
    ranges: _containers.RepeatedCompositeFieldContainer[BlockRange]
    def __init__(self, incarnation: _Optional[int] = ..., number: _Optional[int] = ..., serial: _Optional[int] = ..., ranges: _Optional[_Iterable[_Union[BlockRange, _Mapping]]] = ...) -> None: ...

class BeginUploadRequest(_message.Message):
    __slots__ = ("session", "message")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    message: WorkerMessage
    def __init__(self, session: _Optional[bytes] = ..., message: _Optional[_Union[WorkerMessage, _Mapping]] = ...) -> None: ...

class BeginUploadResponse(_message.Message):
    __slots__ = ("offset", "generation")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    offset: int
    generation: int
    def __init__(self, offset: _Optional[int] = ..., generation: _Optional[int] = ...) -> None: ...

class UploadChunk(_message.Message):
    __slots__ = ("offset", "crc32c", "session", "key", "generation", "data")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    CRC32C_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    offset: int
    crc32c: int
    session: bytes
    key: str
    generation: int
    data: bytes
    def __init__(self, offset: _Optional[int] = ..., crc32c: _Optional[int] = ..., session: _Optional[bytes] = ..., key: _Optional[str] = ..., generation: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class UploadResponse(_message.Message):
    __slots__ = ("offset",)
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    offset: int
    def __init__(self, offset: _Optional[int] = ...) -> None: ...

class CommitUploadRequest(_message.Message):
    __slots__ = ("session", "key", "generation")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    key: str
    generation: int
    def __init__(self, session: _Optional[bytes] = ..., key: _Optional[str] = ..., generation: _Optional[int] = ...) -> None: ...

class CommitUploadResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DownloadRequest(_message.Message):
    __slots__ = ("session", "key", "offset", "limit")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    key: str
    offset: int
    limit: int
    def __init__(self, session: _Optional[bytes] = ..., key: _Optional[str] = ..., offset: _Optional[int] = ..., limit: _Optional[int] = ...) -> None: ...

class DownloadChunk(_message.Message):
    __slots__ = ("offset", "crc32c", "data")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    CRC32C_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    offset: int
    crc32c: int
    data: bytes
    def __init__(self, offset: _Optional[int] = ..., crc32c: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class FollowRequest(_message.Message):
    __slots__ = ("follow", "ack")
    FOLLOW_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    follow: Follow
    ack: FollowAck
    def __init__(self, follow: _Optional[_Union[Follow, _Mapping]] = ..., ack: _Optional[_Union[FollowAck, _Mapping]] = ...) -> None: ...

class FollowResponse(_message.Message):
    __slots__ = ("entry", "beat", "turned")
    ENTRY_FIELD_NUMBER: _ClassVar[int]
    BEAT_FIELD_NUMBER: _ClassVar[int]
    TURNED_FIELD_NUMBER: _ClassVar[int]
    entry: FollowEntry
    beat: FollowBeat
    turned: FollowTurned
    def __init__(self, entry: _Optional[_Union[FollowEntry, _Mapping]] = ..., beat: _Optional[_Union[FollowBeat, _Mapping]] = ..., turned: _Optional[_Union[FollowTurned, _Mapping]] = ...) -> None: ...

class Follow(_message.Message):
    __slots__ = ("node", "run_id", "settings", "epoch", "count", "chain")
    NODE_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    CHAIN_FIELD_NUMBER: _ClassVar[int]
    node: str
    run_id: str
    settings: str
    epoch: int
    count: int
    chain: str
    def __init__(self, node: _Optional[str] = ..., run_id: _Optional[str] = ..., settings: _Optional[str] = ..., epoch: _Optional[int] = ..., count: _Optional[int] = ..., chain: _Optional[str] = ...) -> None: ...

class FollowAck(_message.Message):
    __slots__ = ("count", "ready")
    COUNT_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    count: int
    ready: bool
    def __init__(self, count: _Optional[int] = ..., ready: _Optional[bool] = ...) -> None: ...

class FollowEntry(_message.Message):
    __slots__ = ("index", "record", "blob")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    RECORD_FIELD_NUMBER: _ClassVar[int]
    BLOB_FIELD_NUMBER: _ClassVar[int]
    index: int
    record: str
    blob: ObjectRef
    def __init__(self, index: _Optional[int] = ..., record: _Optional[str] = ..., blob: _Optional[_Union[ObjectRef, _Mapping]] = ...) -> None: ...

class FollowBeat(_message.Message):
    __slots__ = ("count",)
    COUNT_FIELD_NUMBER: _ClassVar[int]
    count: int
    def __init__(self, count: _Optional[int] = ...) -> None: ...

class FollowTurned(_message.Message):
    __slots__ = ("kind", "reason", "count", "chain")
    KIND_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    CHAIN_FIELD_NUMBER: _ClassVar[int]
    kind: str
    reason: str
    count: int
    chain: str
    def __init__(self, kind: _Optional[str] = ..., reason: _Optional[str] = ..., count: _Optional[int] = ..., chain: _Optional[str] = ...) -> None: ...

class BlobRequest(_message.Message):
    __slots__ = ("name", "offset")
    NAME_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    name: str
    offset: int
    def __init__(self, name: _Optional[str] = ..., offset: _Optional[int] = ...) -> None: ...
