"""Credentials in a file of docker's: `config.json`, read at each pull that brings none.

Format: docker's cli config (`auths`), with the repository prefixes of containers-auth.json(5). Credential helpers are
not run.
"""

from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from runtime.errors import InvalidSpec
from runtime.images.image import Auth
from runtime.images.reference import DEFAULT_REGISTRY, Reference

_LIMIT_BYTES = 1 << 20
_HUB = ("docker.io", "index.docker.io", "registry-1.docker.io")


class _Entry(msgspec.Struct, frozen=True):
    auth: str = ""
    username: str = ""
    password: str = ""
    identitytoken: str = ""
    registrytoken: str = ""


class _File(msgspec.Struct, frozen=True):
    auths: dict[str, _Entry] = {}


def credentials(path: Path | None, reference: Reference) -> Auth | None:
    """The most specific entry for `reference`; None without one, or without the file. Raises InvalidSpec, which names
    the file and nothing of its content."""
    if path is None:
        return None
    try:
        with open(path, "rb") as file:
            data = file.read(_LIMIT_BYTES)
        auths = msgspec.json.decode(data, type=_File).auths
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InvalidSpec(f"credentials {path}: {(error.strerror or str(error)).lower()}") from error
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        raise InvalidSpec(f"credentials {path}: not a docker config.json") from None
    best, length = None, -1
    for key, entry in auths.items():
        parts = urlsplit(key if "://" in key else f"//{key}")
        prefix = parts.path.strip("/") if "://" not in key else ""  # https://index.docker.io/v1/ is all of the host
        host = DEFAULT_REGISTRY if parts.netloc in _HUB else parts.netloc
        inside = not prefix or f"{reference.repository}/".startswith(f"{prefix}/")
        if host == reference.registry and inside and len(prefix) > length:
            best, length = entry, len(prefix)
    if best is None:
        return None
    # docker writes this name where the password is an identity token.
    user = "" if best.username == "<token>" else best.username
    return Auth(
        username=user,
        password=best.password if user else "",
        auth=best.auth if not best.identitytoken else "",
        identity_token=best.identitytoken or (best.password if best.username == "<token>" else ""),
        registry_token=best.registrytoken,
    )
