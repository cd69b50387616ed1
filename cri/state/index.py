"""Objects by id, by unique prefix of an id, and by reserved name: in memory, rebuilt when cribd starts."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from typing import Final, Generic, TypeVar

from runtime.errors import InvalidSpec, NotFound

T = TypeVar("T")
_QUERY_LIMIT: Final = 128


class Index(Generic[T]):
    """`kind` is what errors call the objects, such as "container"."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._objects: dict[str, T] = {}
        self._ids: list[str] = []

    def __len__(self) -> int:
        return len(self._objects)

    def __iter__(self) -> Iterator[T]:
        return iter(list(self._objects.values()))

    def add(self, id: str, value: T) -> None:
        if id not in self._objects:
            bisect.insort(self._ids, id)
        self._objects[id] = value

    def discard(self, id: str) -> None:
        if self._objects.pop(id, None) is not None:
            del self._ids[bisect.bisect_left(self._ids, id)]

    def get(self, query: str) -> T:
        """The object whose id is `query` or begins with it.

        Raises NotFound; InvalidSpec for an empty, oversized or ambiguous query.
        """
        if (exact := self._objects.get(query)) is not None:
            return exact
        if not query:
            raise InvalidSpec(f"{self._kind} id is empty")
        if len(query) > _QUERY_LIMIT:
            raise InvalidSpec(f"{self._kind} id has {len(query)} characters")
        at = bisect.bisect_left(self._ids, query)
        found = [id for id in self._ids[at : at + 2] if id.startswith(query)]
        if not found:
            raise NotFound(f"no {self._kind} {query}")
        if len(found) > 1:
            raise InvalidSpec(f"{self._kind} id {query} is ambiguous: {found[0]} and {found[1]} begin with it")
        return self._objects[found[0]]

    def find(self, query: str) -> T | None:
        """As `get`, with None where there is no such object. Raises InvalidSpec."""
        try:
            return self.get(query)
        except NotFound:
            return None


class Names:
    """Which id holds a name; a name is held by one object until it is removed."""

    def __init__(self) -> None:
        self._holders: dict[tuple[object, ...], str] = {}

    def holder(self, name: tuple[object, ...]) -> str | None:
        return self._holders.get(name)

    def reserve(self, name: tuple[object, ...], id: str) -> None:
        assert name not in self._holders, name
        self._holders[name] = id

    def release(self, name: tuple[object, ...], id: str) -> None:
        """Free `name` if `id` holds it."""
        if self._holders.get(name) == id:
            del self._holders[name]
