"""A cribd for the tests of its client: the same services and answers, but a container is a plain process of the host.

It keeps what the `crib` command relies on: states and their order, the CRI's log file, exit codes, codes of errors,
prefixes of ids, filters. It has no namespaces, no image contents and no registry.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, TypeVar

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass

from cri.api import cri_pb2 as pb
from cri.api import crib_pb2

T = TypeVar("T")
TIME = b"2026-11-22T10:00:00.000000000Z"
IMAGE = "localhost/crib/busybox:latest"
REMOTE = "registry.invalid/app:1"
LAYERS = ("sha256:" + "1" * 64, "sha256:" + "2" * 64)
_SERVICES = (
    pb.DESCRIPTOR.services_by_name["RuntimeService"],
    pb.DESCRIPTOR.services_by_name["ImageService"],
    crib_pb2.DESCRIPTOR.services_by_name["Crib"],
)


class Refused(Exception):
    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self.code = code


def _unknown(text: str) -> Refused:
    return Refused(grpc.StatusCode.NOT_FOUND, text)


class Process:
    """A container's program on the host, its output written to a log in the CRI's format."""

    def __init__(self, config: pb.ContainerConfig, log_path: str) -> None:
        self.config, self.log_path = config, log_path
        self.status = pb.ContainerStatus()
        self._process: subprocess.Popen[bytes] | None = None
        self._over = threading.Event()
        self._lock = threading.Lock()

    def start(self) -> None:
        arguments = [*self.config.command, *self.config.args]
        environment = {"PATH": os.environ["PATH"]} | {one.key: one.value.decode() for one in self.config.envs}
        os.makedirs(os.path.dirname(self.log_path), exist_ok=True)
        self._process = subprocess.Popen(
            arguments,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._process.stdout and self._process.stderr
        log = open(self.log_path, "ab", buffering=0)  # noqa: SIM115 - closed by the thread that sees the end
        writers = [
            threading.Thread(target=self._copy, args=(pipe, name, log))
            for pipe, name in ((self._process.stdout, b"stdout"), (self._process.stderr, b"stderr"))
        ]
        self.status.state, self.status.started_at = pb.CONTAINER_RUNNING, time.time_ns()
        for writer in writers:
            writer.start()
        threading.Thread(target=self._end, args=(writers, log)).start()

    def _copy(self, pipe: IO[bytes], stream: bytes, log: IO[bytes]) -> None:
        with pipe:
            for line in pipe:
                tag = b"F" if line.endswith(b"\n") else b"P"
                with self._lock:
                    log.write(
                        b"2026-11-22T10:00:00.000000000Z " + stream + b" " + tag + b" " + line.rstrip(b"\n") + b"\n"
                    )

    def _end(self, writers: list[threading.Thread], log: IO[bytes]) -> None:
        assert self._process is not None
        code = self._process.wait()
        for writer in writers:
            writer.join()
        log.close()
        self.status.exit_code = code if code >= 0 else 128 - code
        self.status.reason = "Error" if code else "Completed"
        self.status.finished_at = time.time_ns()
        self.status.state = pb.CONTAINER_EXITED
        self._over.set()

    def stop(self, grace_s: int) -> None:
        if self._process is None:
            return
        for number, wait_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 30)):
            if not self._over.is_set() and wait_s:
                os.killpg(self._process.pid, number)
            if self._over.wait(wait_s):
                return


class Fake:
    """Serves on `socket` until closed."""

    def __init__(self, socket: Path) -> None:
        self.endpoint = f"unix://{socket}"
        self.pods: dict[str, tuple[pb.PodSandboxConfig, pb.PodSandboxStatus]] = {}
        self.containers: dict[str, tuple[Process, str]] = {}
        self.images: dict[str, pb.Image] = {}
        self.requests: list[tuple[str, Any]] = []
        self.network_ready = True
        self.add_image(IMAGE)
        self._server = grpc.server(ThreadPoolExecutor(8))
        for service in _SERVICES:
            self._server.add_generic_rpc_handlers((self._handler(service),))
        self._server.add_insecure_port(self.endpoint)
        self._server.start()

    def close(self) -> None:
        for process, _ in self.containers.values():
            process.stop(0)
        self._server.stop(0).wait()

    def add_image(self, tag: str) -> pb.Image:
        identifier = f"sha256:{uuid.uuid5(uuid.NAMESPACE_URL, tag).hex * 2}"
        digest = f"{tag.rpartition(':')[0]}@sha256:{'d' * 64}"
        image = pb.Image(id=identifier, repo_tags=[tag], repo_digests=[digest], size=4_300_000, uid=pb.Int64Value())
        return self.images.setdefault(identifier, image)

    # How calls get to methods.

    def _handler(self, service: ServiceDescriptor) -> grpc.GenericRpcHandler:
        return grpc.method_handlers_generic_handler(
            service.full_name, {method.name: self._method(method) for method in service.methods}
        )

    def _method(self, method: MethodDescriptor) -> grpc.RpcMethodHandler[Any, Any]:
        kinds: dict[tuple[bool, bool], Callable[..., grpc.RpcMethodHandler[Any, Any]]] = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
        }

        def handler(request: Any, context: grpc.ServicerContext) -> Any:
            self.requests.append((method.name, request))
            try:
                found = getattr(self, f"on_{method.name}", None)
                if found is None:
                    raise Refused(grpc.StatusCode.UNIMPLEMENTED, f"{method.name} is not implemented")
                return found(request)
            except Refused as refused:
                context.abort(refused.code, str(refused))

        def streaming(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            self.requests.append((method.name, request))
            try:
                yield from getattr(self, f"on_{method.name}")(request)
            except Refused as refused:
                context.abort(refused.code, str(refused))

        return kinds[method.client_streaming, method.server_streaming](
            streaming if method.server_streaming else handler,
            request_deserializer=GetMessageClass(method.input_type).FromString,
            response_serializer=GetMessageClass(method.output_type).SerializeToString,
        )

    @staticmethod
    def _by_id(things: dict[str, T], given: str) -> T | None:
        found = [thing for identifier, thing in things.items() if given and identifier.startswith(given)]
        if len(found) > 1:
            raise Refused(grpc.StatusCode.INVALID_ARGUMENT, f"id {given} is ambiguous")
        return found[0] if found else None

    def _container(self, given: str) -> Process:
        if found := self._by_id(self.containers, given):
            return found[0]
        raise _unknown(f"container {given} not found")

    # The calls.

    def on_Version(self, request: pb.VersionRequest) -> pb.VersionResponse:
        return pb.VersionResponse(
            version="0.1.0", runtime_name="crib", runtime_version="0.1.0", runtime_api_version="v1"
        )

    def on_Status(self, request: pb.StatusRequest) -> pb.StatusResponse:
        ready = pb.RuntimeCondition(type="RuntimeReady", status=True)
        network = pb.RuntimeCondition(type="NetworkReady", status=self.network_ready)
        if not self.network_ready:
            network.reason, network.message = "NetworkPluginNotReady", "no bridge"
        return pb.StatusResponse(status=pb.RuntimeStatus(conditions=[ready, network]))

    def on_RunPodSandbox(self, request: pb.RunPodSandboxRequest) -> pb.RunPodSandboxResponse:
        config, identifier = request.config, uuid.uuid4().hex * 2
        status = pb.PodSandboxStatus(
            id=identifier, metadata=config.metadata, created_at=time.time_ns(), labels=config.labels
        )
        options = config.linux.security_context.namespace_options
        status.linux.namespaces.options.CopyFrom(options)
        if options.network == pb.POD:
            status.network.ip = f"10.88.0.{len(self.pods) + 2}"
        self.pods[identifier] = config, status
        return pb.RunPodSandboxResponse(pod_sandbox_id=identifier)

    def on_StopPodSandbox(self, request: pb.StopPodSandboxRequest) -> pb.StopPodSandboxResponse:
        if found := self._by_id(self.pods, request.pod_sandbox_id):
            status = found[1]
            for process, pod_id in self.containers.values():
                if pod_id == status.id:
                    process.stop(0)
            status.state = pb.SANDBOX_NOTREADY
            status.network.Clear()
        return pb.StopPodSandboxResponse()

    def on_RemovePodSandbox(self, request: pb.RemovePodSandboxRequest) -> pb.RemovePodSandboxResponse:
        self.on_StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=request.pod_sandbox_id))
        if found := self._by_id(self.pods, request.pod_sandbox_id):
            del self.pods[found[1].id]
            self.containers = {key: pair for key, pair in self.containers.items() if pair[1] != found[1].id}
        return pb.RemovePodSandboxResponse()

    def on_PodSandboxStatus(self, request: pb.PodSandboxStatusRequest) -> pb.PodSandboxStatusResponse:
        if found := self._by_id(self.pods, request.pod_sandbox_id):
            info = {"info": '{"config": {"hostname": "h"}, "pid": 1}'} if request.verbose else {}
            return pb.PodSandboxStatusResponse(status=found[1], info=info)
        raise _unknown(f"pod sandbox {request.pod_sandbox_id} not found")

    def on_ListPodSandbox(self, request: pb.ListPodSandboxRequest) -> pb.ListPodSandboxResponse:
        wanted = request.filter
        items = [
            pb.PodSandbox(
                id=status.id,
                metadata=status.metadata,
                state=status.state,
                created_at=status.created_at,
                labels=status.labels,
            )
            for _, status in self.pods.values()
            if status.id.startswith(wanted.id)
            and all(status.labels.get(key) == value for key, value in wanted.label_selector.items())
        ]
        return pb.ListPodSandboxResponse(items=items)

    def on_CreateContainer(self, request: pb.CreateContainerRequest) -> pb.CreateContainerResponse:
        pod = self._by_id(self.pods, request.pod_sandbox_id)
        if pod is None:
            raise _unknown(f"pod sandbox {request.pod_sandbox_id} not found")
        config, identifier = request.config, uuid.uuid4().hex * 2
        image = self.on_ImageStatus(pb.ImageStatusRequest(image=config.image)).image
        if not image.id:
            raise _unknown(f"image {config.image.image} not found")
        process = Process(config, os.path.join(pod[0].log_directory, config.log_path))
        process.status.MergeFrom(
            pb.ContainerStatus(
                id=identifier,
                metadata=config.metadata,
                created_at=time.time_ns(),
                image=config.image,
                image_ref=image.repo_digests[0],
                image_id=image.id,
                labels=config.labels,
                log_path=process.log_path,
            )
        )
        self.containers[identifier] = process, pod[1].id
        return pb.CreateContainerResponse(container_id=identifier)

    def on_StartContainer(self, request: pb.StartContainerRequest) -> pb.StartContainerResponse:
        process = self._container(request.container_id)
        program = [*process.config.command, *process.config.args][0]
        if not shutil.which(program):
            raise Refused(grpc.StatusCode.UNKNOWN, f"step 29/31: execve {program}: no such file or directory")
        process.start()
        return pb.StartContainerResponse()

    def on_StopContainer(self, request: pb.StopContainerRequest) -> pb.StopContainerResponse:
        if found := self._by_id(self.containers, request.container_id):
            found[0].stop(request.timeout)
        return pb.StopContainerResponse()

    def on_RemoveContainer(self, request: pb.RemoveContainerRequest) -> pb.RemoveContainerResponse:
        if found := self._by_id(self.containers, request.container_id):
            found[0].stop(0)
            del self.containers[found[0].status.id]
        return pb.RemoveContainerResponse()

    def on_ListContainers(self, request: pb.ListContainersRequest) -> pb.ListContainersResponse:
        return pb.ListContainersResponse(
            containers=[
                pb.Container(
                    id=process.status.id,
                    pod_sandbox_id=pod_id,
                    metadata=process.status.metadata,
                    image=process.status.image,
                    image_ref=process.status.image_ref,
                    image_id=process.status.image_id,
                    state=process.status.state,
                    created_at=process.status.created_at,
                    labels=process.status.labels,
                )
                for process, pod_id in self.containers.values()
                if pod_id.startswith(request.filter.pod_sandbox_id)
            ]
        )

    def on_ContainerStatus(self, request: pb.ContainerStatusRequest) -> pb.ContainerStatusResponse:
        process = self._container(request.container_id)
        info = {}
        if request.verbose:
            info = {
                "pid": "7",
                "config": '{"envs": [{"key": "TOKEN", "value": "hunter2"}]}',
                "runtimeSpec": '{"process": {"env": ["TOKEN=hunter2", "PATH=/bin"], "cwd": "/"}}',
            }
        return pb.ContainerStatusResponse(status=process.status, info=info)

    def on_ExecSync(self, request: pb.ExecSyncRequest) -> pb.ExecSyncResponse:
        if self._container(request.container_id).status.state != pb.CONTAINER_RUNNING:
            raise Refused(grpc.StatusCode.FAILED_PRECONDITION, f"container {request.container_id} is not running")
        try:
            done = subprocess.run(list(request.cmd), capture_output=True, timeout=request.timeout or None, check=False)
        except subprocess.TimeoutExpired:
            raise Refused(grpc.StatusCode.DEADLINE_EXCEEDED, f"exec timed out after {request.timeout} s") from None
        return pb.ExecSyncResponse(stdout=done.stdout, stderr=done.stderr, exit_code=done.returncode)

    def on_ListImages(self, request: pb.ListImagesRequest) -> pb.ListImagesResponse:
        return pb.ListImagesResponse(images=self.images.values())

    def on_ImageStatus(self, request: pb.ImageStatusRequest) -> pb.ImageStatusResponse:
        given = request.image.image
        for image in self.images.values():
            names = (image.id, *image.repo_tags, *image.repo_digests)
            if given in names or f"{given}:latest" in names or image.id.removeprefix("sha256:").startswith(given):
                spec = {"info": '{"imageSpec": {"config": {"Env": ["KEY=secret"]}}}'}
                return pb.ImageStatusResponse(image=image, info=spec if request.verbose else {})
        return pb.ImageStatusResponse()

    def on_RemoveImage(self, request: pb.RemoveImageRequest) -> pb.RemoveImageResponse:
        self.images.pop(request.image.image, None)
        return pb.RemoveImageResponse()

    def on_Pull(self, request: crib_pb2.PullRequest) -> Iterator[crib_pb2.PullProgress]:
        if request.image != REMOTE:
            raise Refused(grpc.StatusCode.UNKNOWN, f"RegistryUnavailable: pull {request.image}: connection refused")
        for state in (
            crib_pb2.LAYER_WAITING,
            crib_pb2.LAYER_DOWNLOADING,
            crib_pb2.LAYER_UNPACKING,
            crib_pb2.LAYER_DONE,
        ):
            for number, digest in enumerate(LAYERS):
                total = 0 if state == crib_pb2.LAYER_WAITING else 1_000_000 * (number + 1)
                yield crib_pb2.PullProgress(digest=digest, state=state, current_bytes=total // 2, total_bytes=total)
        yield crib_pb2.PullProgress(image_ref=self.add_image(REMOTE).id)

    def on_Load(self, requests: Iterator[crib_pb2.LoadRequest]) -> crib_pb2.LoadResponse:
        archive = b"".join(request.chunk for request in requests)
        if not archive.startswith(b"archive of "):
            raise Refused(grpc.StatusCode.INVALID_ARGUMENT, "the archive is no tar file")
        image = self.add_image(archive.removeprefix(b"archive of ").partition(b"\0")[0].decode())
        return crib_pb2.LoadResponse(images=[crib_pb2.LoadedImage(id=image.id, repo_tags=image.repo_tags)])

    def on_Plan(self, request: crib_pb2.PlanRequest) -> crib_pb2.PlanResponse:
        kind = "pod" if self._by_id(self.pods, request.id) else "container"
        steps = [
            crib_pb2.PlanStep(index=1, phase="rootfs", text="overlay on /", started_ns=5_000_000, duration_ns=250_000),
            crib_pb2.PlanStep(index=2, phase="exec", text="execve sh", started_ns=6_000_000, duration_ns=1_500_000),
        ]
        return crib_pb2.PlanResponse(id=request.id, kind=kind, steps=steps, total_ns=3_000_000)

    def on_Doctor(self, request: crib_pb2.DoctorRequest) -> crib_pb2.DoctorResponse:
        return crib_pb2.DoctorResponse(
            probes=[
                crib_pb2.Probe(name="overlay", ok=True, detail="lowerdir+"),
                crib_pb2.Probe(name="idmap", ok=False, detail="EINVAL", fallback="chown"),
            ]
        )
