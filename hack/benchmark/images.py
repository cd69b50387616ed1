"""Measure pulls side by side: images made from a seed, on a registry on loopback (docker-registry), by each runtime.

Each round has an image of its own that no runtime has, and the page cache is dropped before each pull where that is
allowed. Images are removed only after all of a shape's pulls: a removal writes on while the next pull is measured, and
ext4 takes long to create files in the minutes after as many were removed. Memory is the
highest sum of Pss of the daemon and its children that was seen during the pulls. CPU is that of the daemon and all that
it starts, by cgroup accounting; what the kernel writes back for it is not in it.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

from cri.api import cri_pb2 as api
from hack.benchmark.account import Adopted
from hack.benchmark.client import Endpoint

MIB = 1 << 20
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_ARCHITECTURE = {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)


def _data(chance: random.Random, size: int) -> bytes:
    """Half of it compresses, as in programs."""
    return chance.randbytes(size // 2) + bytes(range(256)) * (size // 512)


def _layer(chance: random.Random, files: int, size: int) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for number in range(files):
            if number % 100 == 0:
                directory = tarfile.TarInfo(f"d{chance.randrange(1 << 30)}-{number // 100}")
                directory.type, directory.mode = tarfile.DIRTYPE, 0o755
                tar.addfile(directory)
            info = tarfile.TarInfo(f"{directory.name}/f{number}")
            info.size, info.mtime = size, 1_700_000_000
            tar.addfile(info, io.BytesIO(_data(chance, size)[:size].ljust(size, b"x")))
    return out.getvalue()


# Name, layers, files of each, bytes of each file; divided by --scale.
SHAPES = (
    ("one-large", 1, 16, 64 * MIB),
    ("ten-of-50mib", 10, 50, MIB),
    ("sixty-small", 60, 20, 4096),
    ("many-files", 1, 100_000, 1024),
)


class _Registry:
    def __init__(self, host: str) -> None:
        self.host = host

    def _send(self, method: str, url: str, body: bytes = b"", kind: str = "") -> str:
        parts = urlsplit(url if "://" in url else f"http://{self.host}{url}")
        connection = HTTPConnection(parts.netloc, timeout=120)
        connection.request(method, f"{parts.path}?{parts.query}", body, {"Content-Type": kind} if kind else {})
        answer = connection.getresponse()
        answer.read()
        connection.close()
        if answer.status not in (201, 202):
            raise RuntimeError(f"registry: {method} {url}: {answer.status}")
        return answer.headers.get("Location", "")

    def has(self, name: str) -> bool:
        connection = HTTPConnection(self.host, timeout=120)
        connection.request("HEAD", f"/v2/{name}/manifests/1", headers={"Accept": _MANIFEST})
        answer = connection.getresponse()
        answer.read()
        connection.close()
        return answer.status == 200

    def blob(self, name: str, data: bytes) -> dict[str, object]:
        location = self._send("POST", f"/v2/{name}/blobs/uploads/")
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        join = "&" if "?" in location else "?"
        self._send("PUT", f"{location}{join}digest={digest}", data, "application/octet-stream")
        return {"digest": digest, "size": len(data)}

    def push(self, name: str, layers: Iterator[bytes]) -> None:
        described, diff_ids = [], []
        for plain in layers:
            diff_ids.append(f"sha256:{hashlib.sha256(plain).hexdigest()}")
            blob = self.blob(name, gzip.compress(plain, 1, mtime=0))
            described.append({"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", **blob})
        rootfs = {"type": "layers", "diff_ids": diff_ids}
        config = json.dumps({"architecture": _ARCHITECTURE, "os": "linux", "config": {}, "rootfs": rootfs}).encode()
        manifest = {
            "schemaVersion": 2,
            "mediaType": _MANIFEST,
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", **self.blob(name, config)},
            "layers": described,
        }
        self._send("PUT", f"/v2/{name}/manifests/1", json.dumps(manifest).encode(), _MANIFEST)


@contextmanager
def _registry(port: int, directory: str) -> Iterator[_Registry]:
    settings = Path(directory, "registry.yml")
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text(
        "version: 0.1\nlog: {level: error, accesslog: {disabled: true}}\n"
        f"storage: {{filesystem: {{rootdirectory: {directory}/data}}}}\nhttp: {{addr: '127.0.0.1:{port}', secret: x}}\n"
    )
    with subprocess.Popen(["docker-registry", "serve", str(settings)], stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 30
            while True:
                connection = HTTPConnection(f"127.0.0.1:{port}", timeout=5)
                try:
                    connection.request("GET", "/v2/")
                    connection.getresponse().read()
                    break
                except ConnectionRefusedError:
                    if time.monotonic() > deadline or process.poll() is not None:
                        raise
                    threading.Event().wait(0.05)
                finally:
                    connection.close()
            yield _Registry(f"127.0.0.1:{port}")
        finally:
            process.kill()


class _Memory:
    """The highest Pss of a process and its children while in the context, in bytes."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.peak = 0

    def __enter__(self) -> _Memory:
        self._thread.start()
        return self

    def __exit__(self, *ignored: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.1):
            self.peak = max(self.peak, sum(map(_pss, _tree(self._pid))))


def _tree(pid: int) -> list[int]:
    found = [pid]
    for one in found:
        try:
            for task in os.listdir(f"/proc/{one}/task"):
                found += map(int, Path(f"/proc/{one}/task/{task}/children").read_text().split())
        except OSError:
            continue
    return found


def _pss(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    except (OSError, StopIteration):
        return 0


def _drop_caches(keep: bool) -> None:
    os.sync()
    if keep:
        return
    try:
        Path("/proc/sys/vm/drop_caches").write_text("1")
    except OSError:
        pass


def main() -> int:
    parser = argparse.ArgumentParser(prog="hack/bench images", description=__doc__)
    add = parser.add_argument
    add("--endpoint", action="append", required=True, metavar="NAME=unix:///SOCKET", help="a CRI socket; repeatable")
    add("--rounds", type=int, default=3, help="pulls of each image by each runtime (%(default)s)")
    add("--scale", type=int, default=1, help="divide sizes and numbers of files by this (%(default)s)")
    add("--shape", action="append", choices=[shape[0] for shape in SHAPES], help="only these")
    add("--seed", type=int, default=1)
    add("--port", type=int, default=5077, help="the registry's (%(default)s)")
    add("--work", default="/var/tmp", help="where the registry keeps its blobs (%(default)s)")
    add("--keep", metavar="DIRECTORY", help="keep the registry there, and take images that it has as they are")
    add("--warm", action="store_true", help="leave the page cache alone")
    add("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    endpoints = []
    for given in options.endpoint:
        name, _, target = given.partition("=")
        endpoints.append(Endpoint(name, target, "", "", "", False, timeout_s=1800))
    results = []
    with (
        tempfile.TemporaryDirectory(prefix="crib-bench-images-", dir=options.work) as temporary,
        _registry(options.port, options.keep or temporary) as registry,
        ExitStack() as stack,
    ):
        accounts = [stack.enter_context(Adopted(e.name, e.daemon_pid())) for e in endpoints]
        for endpoint in endpoints:
            answer = endpoint.call("Version")
            print(f"{endpoint.name}: {answer.runtime_name} {answer.runtime_version}", flush=True)
        for shape, layers, files, size in SHAPES:
            if options.shape and shape not in options.shape:
                continue
            if files * size > 50 * MIB or layers == 10:
                files, size = (max(1, files // options.scale), size) if files > 50 else (files, size // options.scale)
            images = []
            for number in range(options.rounds):
                chance = random.Random(f"{options.seed} {shape} {number}")
                name = f"{shape}-{options.seed}-{options.scale}-{number}"
                if not registry.has(name):
                    registry.push(name, (_layer(chance, files, size) for _ in range(layers)))
                images.append(f"{registry.host}/{name}:1")
            results.append(_measure(shape, images, endpoints, accounts, options.warm))
            print(_line(results[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    return 0


def _measure(
    shape: str, images: list[str], endpoints: list[Endpoint], accounts: list[Adopted], warm: bool
) -> dict[str, object]:
    seconds: dict[str, list[float]] = {endpoint.name: [] for endpoint in endpoints}
    cpu: dict[str, list[float]] = {endpoint.name: [] for endpoint in endpoints}
    peaks = dict.fromkeys(seconds, 0)
    _remove(images, endpoints)  # what an interrupted run has left
    pairs = list(zip(endpoints, accounts, strict=True))
    for number, image in enumerate(images):
        for endpoint, account in pairs[number % len(pairs) :] + pairs[: number % len(pairs)]:
            _drop_caches(warm)
            with _Memory(account.daemon) as memory:
                used, began = account.cpu_s(), time.perf_counter()
                endpoint.call("PullImage", image=api.ImageSpec(image=image))
                seconds[endpoint.name].append(time.perf_counter() - began)
            cpu[endpoint.name].append(account.cpu_s() - used)
            peaks[endpoint.name] = max(peaks[endpoint.name], memory.peak)
    _remove(images, endpoints)
    return {"shape": shape, "seconds": seconds, "cpu_seconds": cpu, "peak_bytes": peaks}


def _remove(images: list[str], endpoints: list[Endpoint]) -> None:
    for endpoint in endpoints:
        for image in images:
            endpoint.call("RemoveImage", image=api.ImageSpec(image=image))


def _line(result: dict[str, object]) -> str:
    seconds, cpu, peaks = result["seconds"], result["cpu_seconds"], result["peak_bytes"]
    assert isinstance(cpu, dict)
    assert isinstance(seconds, dict)
    assert isinstance(peaks, dict)
    cells = [
        f"{name} {statistics.median(times):7.2f} s (best {min(times):.2f}, CPU {statistics.median(cpu[name]):.2f}, "
        f"peak {peaks[name] / MIB:.0f} MiB)"
        for name, times in seconds.items()
    ]
    return f"{result['shape']:<14}" + "   ".join(cells)


if __name__ == "__main__":
    sys.exit(main())
