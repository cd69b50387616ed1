"""What every object of the OCI runtime spec has in common."""

from __future__ import annotations

import msgspec


class Part(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, rename="camel"):
    """One JSON object of config.json: fields named as in OCI, absent when they hold their default.

    OCI runtime spec 1.2. Unknown members are ignored when decoding, as the specification asks of a runtime.
    """
