"""Which of many tensors are taken together."""

from collections.abc import Hashable, Iterable, Iterator, Sequence


def grouped(keys: Iterable[Hashable]) -> dict[Hashable, list[int]]:
    """Places of equal keys.

    Args:
        keys: one a place.

    Returns:
        The places of every key, ascending.
    """
    groups: dict[Hashable, list[int]] = {}
    for place, key in enumerate(keys):
        groups.setdefault(key, []).append(place)
    return groups


def in_parts(places: Sequence[int], sizes: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Places, so many at a time that their sizes make no more than a limit; or one that is larger.

    Args:
        places: of which at least one.
        sizes: of everything, by place.
        limit: of the sum of a part.

    Yields:
        The parts, in order.
    """
    part, total = [places[0]], sizes[places[0]]
    for place in places[1:]:
        if total + sizes[place] > limit:
            yield part
            part, total = [], 0
        part.append(place)
        total += sizes[place]
    yield part
