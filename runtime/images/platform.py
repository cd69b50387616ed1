"""Which of an image's variants a machine can run: what its processor's architecture is called in images, and how far it
goes (Go's GOARCH, GOAMD64 and GOARM64, as the OCI image index has them)."""

from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from os import uname
from pathlib import Path

_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "i686": "386"}
# Each variant, and what /proc/cpuinfo tells of a processor that has it and not only those before.
_VARIANTS: dict[str, tuple[tuple[str, str], ...]] = {
    "amd64": (
        ("v1", ""),
        ("v2", "cx16 lahf_lm popcnt pni sse4_1 sse4_2 ssse3"),
        ("v3", "abm avx avx2 bmi1 bmi2 f16c fma movbe xsave"),
        ("v4", "avx512f avx512bw avx512cd avx512dq avx512vl"),
    ),
    "arm64": (
        ("v8", ""),
        ("v8.1", "asimdrdm atomics crc32"),
        ("v8.2", "dcpop"),
        ("v8.3", "fcma jscvt lrcpc paca"),
        ("v8.4", "asimddp dit flagm ilrcpc uscat"),
        ("v8.5", "flagm2 frint sb"),
        ("v9", "sve2"),
    ),
}
# What an entry without a variant means.
_DEFAULTS = {"amd64": "v1", "arm64": "v8", "arm": "v7"}


@dataclass(frozen=True, slots=True)
class Machine:
    """`variants` are those that it can run, the least first; none where an architecture knows none."""

    architecture: str
    variants: tuple[str, ...] = ()

    def __str__(self) -> str:
        last = self.variants[-1:]
        return "/".join(("linux", self.architecture, *last))

    def rank(self, architecture: str, variant: str) -> int | None:
        """How much of the machine such an entry uses; None when it can't run it."""
        if architecture != self.architecture:
            return None
        variant = (variant or _DEFAULTS.get(architecture, "")).removesuffix(".0")
        if not self.variants and not variant:
            return 0
        return self.variants.index(variant) if variant in self.variants else None


def machine(name: str, features: Collection[str]) -> Machine:
    """The machine that uname calls `name`, with these flags or features in /proc/cpuinfo."""
    if name.startswith("armv"):
        return Machine("arm", tuple(f"v{level}" for level in range(5, int(name[4]) + 1)))
    architecture = _ARCHITECTURES.get(name, name)
    variants = []
    for variant, needed in _VARIANTS.get(architecture, ()):
        if not set(needed.split()).issubset(features):
            break
        variants.append(variant)
    return Machine(architecture, tuple(variants))


@cache
def this_machine() -> Machine:
    """What all processors of this machine can do."""
    listed = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    features = [set(value.split()) for key, _, value in listed if key.strip() in ("flags", "Features")]
    return machine(uname().machine, set.intersection(*features) if features else set())
