"""Who containers run as, by the request and their image."""

from __future__ import annotations

from typing import Final

from cri.api import cri_pb2 as pb
from cri.translate.user import FILE_LIMIT_BYTES, ResolvedUser, needs_files, resolve_user
from runtime.errors import Exhausted, InvalidSpec, NotFound
from runtime.images import Image, Images

_KEPT: Final = 256
_GROUPS_KEPT: Final = 64


class Users:
    """Remembers the latest answers: what an image's id stands for doesn't change. For threads."""

    def __init__(self, images: Images) -> None:
        self._images = images
        self._known: dict[tuple[str, bytes], ResolvedUser] = {}

    def resolve(self, security: pb.LinuxContainerSecurityContext, image: Image) -> ResolvedUser:
        """See `resolve_user`. Raises InvalidSpec, NotFound for a missing image."""
        asked = pb.LinuxContainerSecurityContext(
            run_as_username=security.run_as_username,
            supplemental_groups=security.supplemental_groups,
            supplemental_groups_policy=security.supplemental_groups_policy,
        )
        for name in ("run_as_user", "run_as_group"):
            if security.HasField(name):
                getattr(asked, name).CopyFrom(getattr(security, name))
        key = image.id, asked.SerializeToString(deterministic=True)
        user = self._known.get(key)
        if user is None:
            passwd = group = None
            if needs_files(asked):
                passwd, group = self._file(image, "/etc/passwd"), self._file(image, "/etc/group")
            user = resolve_user(asked, image.config.user, passwd, group)
            if len(user.additional_gids) <= _GROUPS_KEPT:
                while len(self._known) >= _KEPT:
                    self._known.pop(next(iter(self._known)), None)
                self._known[key] = user
        return user

    def _file(self, image: Image, path: str) -> bytes | None:
        try:
            return self._images.read_file(image.id, path, FILE_LIMIT_BYTES)
        except NotFound:
            return None
        except Exhausted as error:
            raise InvalidSpec(f"image {image.id}: {path} is too large: {error}") from error
