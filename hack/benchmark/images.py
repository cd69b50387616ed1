"""Measure pulls side by side: images made from a seed, on a registry on loopback (docker-registry), by each runtime.

Each pull is of an image that the runtime doesn't have, with the page cache dropped before it where that is allowed; it
is removed only after all of a round's pulls, since a removal writes on while the next pull is measured. Memory is the
highest sum of Pss of the daemon and its children that was seen during the pulls.
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
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

from cri.api import cri_pb2 as api
from hack.benchmark.client import Endpoint

MIB = 1 << 20
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
        kind = "application/vnd.oci.image.manifest.v1+json"
        manifest = {
            "schemaVersion": 2,
            "mediaType": kind,
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", **self.blob(name, config)},
            "layers": described,
        }
        self._send("PUT", f"/v2/{name}/manifests/1", json.dumps(manifest).encode(), kind)


@contextmanager
def _registry(port: int, directory: str) -> Iterator[_Registry]:
    settings = Path(directory, "registry.yml")
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


def _drop_caches() -> None:
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("1")
    except OSError:
        pass


def main() -> int:
    parser = argparse.ArgumentParser(prog="hack/bench-images", description=__doc__)
    add = parser.add_argument
    add("--endpoint", action="append", required=True, metavar="NAME=unix:///SOCKET", help="a CRI socket; repeatable")
    add("--rounds", type=int, default=3, help="pulls of each image by each runtime (%(default)s)")
    add("--scale", type=int, default=1, help="divide sizes and numbers of files by this (%(default)s)")
    add("--shape", action="append", choices=[shape[0] for shape in SHAPES], help="only these")
    add("--seed", type=int, default=1)
    add("--port", type=int, default=5077, help="the registry's (%(default)s)")
    add("--work", default="/var/tmp", help="where the registry keeps its blobs (%(default)s)")
    add("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    endpoints = []
    for given in options.endpoint:
        name, _, target = given.partition("=")
        endpoints.append(Endpoint(name, target, "", "", "", False, timeout_s=1800))
    results = []
    with (
        tempfile.TemporaryDirectory(prefix="crib-bench-images-", dir=options.work) as directory,
        _registry(options.port, directory) as registry,
    ):
        for endpoint in endpoints:
            answer = endpoint.call("Version")
            print(f"{endpoint.name}: {answer.runtime_name} {answer.runtime_version}", flush=True)
        for shape, layers, files, size in SHAPES:
            if options.shape and shape not in options.shape:
                continue
            if files * size > 50 * MIB or layers == 10:
                files, size = (max(1, files // options.scale), size) if files > 50 else (files, size // options.scale)
            chance = random.Random(f"{options.seed} {shape}")
            registry.push(shape, (_layer(chance, files, size) for _ in range(layers)))
            results.append(_measure(shape, f"{registry.host}/{shape}:1", endpoints, options.rounds))
            print(_line(results[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    return 0


def _measure(shape: str, image: str, endpoints: list[Endpoint], rounds: int) -> dict[str, object]:
    spec = api.ImageSpec(image=image)
    seconds: dict[str, list[float]] = {endpoint.name: [] for endpoint in endpoints}
    peaks = dict.fromkeys(seconds, 0)
    for number in range(rounds):
        for endpoint in endpoints[number % len(endpoints) :] + endpoints[: number % len(endpoints)]:
            _drop_caches()
            with _Memory(endpoint.daemon_pid()) as memory:
                began = time.perf_counter()
                endpoint.call("PullImage", image=spec)
                seconds[endpoint.name].append(time.perf_counter() - began)
            peaks[endpoint.name] = max(peaks[endpoint.name], memory.peak)
        for endpoint in endpoints:
            endpoint.call("RemoveImage", image=spec)
    return {"shape": shape, "seconds": seconds, "peak_bytes": peaks}


def _line(result: dict[str, object]) -> str:
    seconds, peaks = result["seconds"], result["peak_bytes"]
    assert isinstance(seconds, dict)
    assert isinstance(peaks, dict)
    cells = [
        f"{name} {statistics.median(times):7.2f} s (best {min(times):.2f}, peak {peaks[name] / MIB:.0f} MiB)"
        for name, times in seconds.items()
    ]
    return f"{result['shape']:<14}" + "   ".join(cells)


if __name__ == "__main__":
    sys.exit(main())
