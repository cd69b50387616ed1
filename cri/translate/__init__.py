"""CRI messages to the OCI spec and back: pure functions of their arguments, no input or output, no kernel."""

from cri.translate.container import MASKED_PATHS, READONLY_PATHS, ContainerInput, check_container, container_to_spec
from cri.translate.defaults import Defaults, Handler, Host
from cri.translate.devices import HostDevice
from cri.translate.etc import hosts
from cri.translate.fingerprint import difference, fingerprint
from cri.translate.image import image_to_cri
from cri.translate.logs import log_path
from cri.translate.mounts import PodPaths
from cri.translate.namespaces import PodNamespaces
from cri.translate.sandbox import HostPort, PodPlan, container_key, sandbox_key, sandbox_to_pod
from cri.translate.seccomp import localhost_file
from cri.translate.signals import stop_signal
from cri.translate.user import ResolvedUser, resolve_user

__all__ = [
    "MASKED_PATHS",
    "READONLY_PATHS",
    "ContainerInput",
    "Defaults",
    "Handler",
    "Host",
    "HostDevice",
    "HostPort",
    "PodNamespaces",
    "PodPaths",
    "PodPlan",
    "ResolvedUser",
    "check_container",
    "container_key",
    "container_to_spec",
    "difference",
    "fingerprint",
    "hosts",
    "image_to_cri",
    "localhost_file",
    "log_path",
    "resolve_user",
    "sandbox_key",
    "sandbox_to_pod",
    "stop_signal",
]
