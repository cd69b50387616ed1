from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class LayerState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LAYER_WAITING: _ClassVar[LayerState]
    LAYER_DOWNLOADING: _ClassVar[LayerState]
    LAYER_UNPACKING: _ClassVar[LayerState]
    LAYER_DONE: _ClassVar[LayerState]
    LAYER_EXISTS: _ClassVar[LayerState]
LAYER_WAITING: LayerState
LAYER_DOWNLOADING: LayerState
LAYER_UNPACKING: LayerState
LAYER_DONE: LayerState
LAYER_EXISTS: LayerState

class LoadRequest(_message.Message):
    __slots__ = ("chunk",)
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    chunk: bytes
    def __init__(self, chunk: _Optional[bytes] = ...) -> None: ...

class LoadResponse(_message.Message):
    __slots__ = ("images",)
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    images: _containers.RepeatedCompositeFieldContainer[LoadedImage]
    def __init__(self, images: _Optional[_Iterable[_Union[LoadedImage, _Mapping]]] = ...) -> None: ...

class LoadedImage(_message.Message):
    __slots__ = ("id", "repo_tags")
    ID_FIELD_NUMBER: _ClassVar[int]
    REPO_TAGS_FIELD_NUMBER: _ClassVar[int]
    id: str
    repo_tags: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, id: _Optional[str] = ..., repo_tags: _Optional[_Iterable[str]] = ...) -> None: ...

class PullRequest(_message.Message):
    __slots__ = ("image", "username", "password", "auth", "server_address", "identity_token", "registry_token")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    USERNAME_FIELD_NUMBER: _ClassVar[int]
    PASSWORD_FIELD_NUMBER: _ClassVar[int]
    AUTH_FIELD_NUMBER: _ClassVar[int]
    SERVER_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_TOKEN_FIELD_NUMBER: _ClassVar[int]
    REGISTRY_TOKEN_FIELD_NUMBER: _ClassVar[int]
    image: str
    username: str
    password: str
    auth: str
    server_address: str
    identity_token: str
    registry_token: str
    def __init__(self, image: _Optional[str] = ..., username: _Optional[str] = ..., password: _Optional[str] = ..., auth: _Optional[str] = ..., server_address: _Optional[str] = ..., identity_token: _Optional[str] = ..., registry_token: _Optional[str] = ...) -> None: ...

class PullProgress(_message.Message):
    __slots__ = ("digest", "state", "current_bytes", "total_bytes", "image_ref")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    CURRENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    IMAGE_REF_FIELD_NUMBER: _ClassVar[int]
    digest: str
    state: LayerState
    current_bytes: int
    total_bytes: int
    image_ref: str
    def __init__(self, digest: _Optional[str] = ..., state: _Optional[_Union[LayerState, str]] = ..., current_bytes: _Optional[int] = ..., total_bytes: _Optional[int] = ..., image_ref: _Optional[str] = ...) -> None: ...

class SaveRequest(_message.Message):
    __slots__ = ("images",)
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    images: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, images: _Optional[_Iterable[str]] = ...) -> None: ...

class SaveChunk(_message.Message):
    __slots__ = ("chunk",)
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    chunk: bytes
    def __init__(self, chunk: _Optional[bytes] = ...) -> None: ...

class CheckRequest(_message.Message):
    __slots__ = ("repair",)
    REPAIR_FIELD_NUMBER: _ClassVar[int]
    repair: bool
    def __init__(self, repair: _Optional[bool] = ...) -> None: ...

class CheckFinding(_message.Message):
    __slots__ = ("layer", "diff_id", "images", "problem", "repaired")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    DIFF_ID_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    REPAIRED_FIELD_NUMBER: _ClassVar[int]
    layer: str
    diff_id: str
    images: _containers.RepeatedScalarFieldContainer[str]
    problem: str
    repaired: bool
    def __init__(self, layer: _Optional[str] = ..., diff_id: _Optional[str] = ..., images: _Optional[_Iterable[str]] = ..., problem: _Optional[str] = ..., repaired: _Optional[bool] = ...) -> None: ...

class StorageRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StorageResponse(_message.Message):
    __slots__ = ("images", "layers", "containers")
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    CONTAINERS_FIELD_NUMBER: _ClassVar[int]
    images: _containers.RepeatedCompositeFieldContainer[StoredImage]
    layers: _containers.RepeatedCompositeFieldContainer[StoredLayer]
    containers: _containers.RepeatedCompositeFieldContainer[StoredContainer]
    def __init__(self, images: _Optional[_Iterable[_Union[StoredImage, _Mapping]]] = ..., layers: _Optional[_Iterable[_Union[StoredLayer, _Mapping]]] = ..., containers: _Optional[_Iterable[_Union[StoredContainer, _Mapping]]] = ...) -> None: ...

class StoredImage(_message.Message):
    __slots__ = ("id", "repo_tags", "repo_digests", "layers", "pinned", "size_bytes")
    ID_FIELD_NUMBER: _ClassVar[int]
    REPO_TAGS_FIELD_NUMBER: _ClassVar[int]
    REPO_DIGESTS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    id: str
    repo_tags: _containers.RepeatedScalarFieldContainer[str]
    repo_digests: _containers.RepeatedScalarFieldContainer[str]
    layers: _containers.RepeatedScalarFieldContainer[str]
    pinned: bool
    size_bytes: int
    def __init__(self, id: _Optional[str] = ..., repo_tags: _Optional[_Iterable[str]] = ..., repo_digests: _Optional[_Iterable[str]] = ..., layers: _Optional[_Iterable[str]] = ..., pinned: _Optional[bool] = ..., size_bytes: _Optional[int] = ...) -> None: ...

class StoredLayer(_message.Message):
    __slots__ = ("name", "diff_id", "size_bytes", "inodes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIFF_ID_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    INODES_FIELD_NUMBER: _ClassVar[int]
    name: str
    diff_id: str
    size_bytes: int
    inodes: int
    def __init__(self, name: _Optional[str] = ..., diff_id: _Optional[str] = ..., size_bytes: _Optional[int] = ..., inodes: _Optional[int] = ...) -> None: ...

class StoredContainer(_message.Message):
    __slots__ = ("id", "image", "size_bytes", "inodes", "layers", "volume")
    ID_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    INODES_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    VOLUME_FIELD_NUMBER: _ClassVar[int]
    id: str
    image: str
    size_bytes: int
    inodes: int
    layers: _containers.RepeatedScalarFieldContainer[str]
    volume: bool
    def __init__(self, id: _Optional[str] = ..., image: _Optional[str] = ..., size_bytes: _Optional[int] = ..., inodes: _Optional[int] = ..., layers: _Optional[_Iterable[str]] = ..., volume: _Optional[bool] = ...) -> None: ...

class PlanRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class PlanResponse(_message.Message):
    __slots__ = ("id", "kind", "steps", "total_ns")
    ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_NS_FIELD_NUMBER: _ClassVar[int]
    id: str
    kind: str
    steps: _containers.RepeatedCompositeFieldContainer[PlanStep]
    total_ns: int
    def __init__(self, id: _Optional[str] = ..., kind: _Optional[str] = ..., steps: _Optional[_Iterable[_Union[PlanStep, _Mapping]]] = ..., total_ns: _Optional[int] = ...) -> None: ...

class PlanStep(_message.Message):
    __slots__ = ("index", "phase", "text", "started_ns", "duration_ns", "error")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    STARTED_NS_FIELD_NUMBER: _ClassVar[int]
    DURATION_NS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    index: int
    phase: str
    text: str
    started_ns: int
    duration_ns: int
    error: str
    def __init__(self, index: _Optional[int] = ..., phase: _Optional[str] = ..., text: _Optional[str] = ..., started_ns: _Optional[int] = ..., duration_ns: _Optional[int] = ..., error: _Optional[str] = ...) -> None: ...

class DoctorRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DoctorResponse(_message.Message):
    __slots__ = ("probes",)
    PROBES_FIELD_NUMBER: _ClassVar[int]
    probes: _containers.RepeatedCompositeFieldContainer[Probe]
    def __init__(self, probes: _Optional[_Iterable[_Union[Probe, _Mapping]]] = ...) -> None: ...

class Probe(_message.Message):
    __slots__ = ("name", "ok", "detail", "fallback")
    NAME_FIELD_NUMBER: _ClassVar[int]
    OK_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    FALLBACK_FIELD_NUMBER: _ClassVar[int]
    name: str
    ok: bool
    detail: str
    fallback: str
    def __init__(self, name: _Optional[str] = ..., ok: _Optional[bool] = ..., detail: _Optional[str] = ..., fallback: _Optional[str] = ...) -> None: ...

class NetworkRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class NetworkResponse(_message.Message):
    __slots__ = ("networks", "holds", "rules")
    NETWORKS_FIELD_NUMBER: _ClassVar[int]
    HOLDS_FIELD_NUMBER: _ClassVar[int]
    RULES_FIELD_NUMBER: _ClassVar[int]
    networks: _containers.RepeatedCompositeFieldContainer[NodeNetwork]
    holds: _containers.RepeatedCompositeFieldContainer[NetworkHold]
    rules: _containers.RepeatedCompositeFieldContainer[NetworkRule]
    def __init__(self, networks: _Optional[_Iterable[_Union[NodeNetwork, _Mapping]]] = ..., holds: _Optional[_Iterable[_Union[NetworkHold, _Mapping]]] = ..., rules: _Optional[_Iterable[_Union[NetworkRule, _Mapping]]] = ...) -> None: ...

class NodeNetwork(_message.Message):
    __slots__ = ("name", "kind", "current", "ranges", "detail")
    NAME_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    CURRENT_FIELD_NUMBER: _ClassVar[int]
    RANGES_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    name: str
    kind: str
    current: bool
    ranges: _containers.RepeatedScalarFieldContainer[str]
    detail: str
    def __init__(self, name: _Optional[str] = ..., kind: _Optional[str] = ..., current: _Optional[bool] = ..., ranges: _Optional[_Iterable[str]] = ..., detail: _Optional[str] = ...) -> None: ...

class NetworkHold(_message.Message):
    __slots__ = ("network", "pod", "pod_name", "pod_namespace", "addresses", "host_interface", "host_ports", "since_ns", "released")
    NETWORK_FIELD_NUMBER: _ClassVar[int]
    POD_FIELD_NUMBER: _ClassVar[int]
    POD_NAME_FIELD_NUMBER: _ClassVar[int]
    POD_NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    HOST_INTERFACE_FIELD_NUMBER: _ClassVar[int]
    HOST_PORTS_FIELD_NUMBER: _ClassVar[int]
    SINCE_NS_FIELD_NUMBER: _ClassVar[int]
    RELEASED_FIELD_NUMBER: _ClassVar[int]
    network: str
    pod: str
    pod_name: str
    pod_namespace: str
    addresses: _containers.RepeatedScalarFieldContainer[str]
    host_interface: str
    host_ports: _containers.RepeatedCompositeFieldContainer[NetworkHostPort]
    since_ns: int
    released: bool
    def __init__(self, network: _Optional[str] = ..., pod: _Optional[str] = ..., pod_name: _Optional[str] = ..., pod_namespace: _Optional[str] = ..., addresses: _Optional[_Iterable[str]] = ..., host_interface: _Optional[str] = ..., host_ports: _Optional[_Iterable[_Union[NetworkHostPort, _Mapping]]] = ..., since_ns: _Optional[int] = ..., released: _Optional[bool] = ...) -> None: ...

class NetworkHostPort(_message.Message):
    __slots__ = ("protocol", "host_ip", "host_port", "container_port")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    HOST_IP_FIELD_NUMBER: _ClassVar[int]
    HOST_PORT_FIELD_NUMBER: _ClassVar[int]
    CONTAINER_PORT_FIELD_NUMBER: _ClassVar[int]
    protocol: str
    host_ip: str
    host_port: int
    container_port: int
    def __init__(self, protocol: _Optional[str] = ..., host_ip: _Optional[str] = ..., host_port: _Optional[int] = ..., container_port: _Optional[int] = ...) -> None: ...

class NetworkRule(_message.Message):
    __slots__ = ("table", "chain", "text")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    CHAIN_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    table: str
    chain: str
    text: str
    def __init__(self, table: _Optional[str] = ..., chain: _Optional[str] = ..., text: _Optional[str] = ...) -> None: ...

class CheckNetworkRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CheckNetworkResponse(_message.Message):
    __slots__ = ("findings",)
    FINDINGS_FIELD_NUMBER: _ClassVar[int]
    findings: _containers.RepeatedCompositeFieldContainer[NetworkFinding]
    def __init__(self, findings: _Optional[_Iterable[_Union[NetworkFinding, _Mapping]]] = ...) -> None: ...

class NetworkFinding(_message.Message):
    __slots__ = ("name", "ok", "detail", "fix")
    NAME_FIELD_NUMBER: _ClassVar[int]
    OK_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    FIX_FIELD_NUMBER: _ClassVar[int]
    name: str
    ok: bool
    detail: str
    fix: str
    def __init__(self, name: _Optional[str] = ..., ok: _Optional[bool] = ..., detail: _Optional[str] = ..., fix: _Optional[str] = ...) -> None: ...
