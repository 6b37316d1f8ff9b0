"""Which rows share a row of a batch: bin packing of lengths."""

import bisect
from collections.abc import Sequence


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Numbers of the items of each bin of `room`, every item in one of them.

    Best fit decreasing (Johnson 1974): the longest item first, into the fullest bin that takes it;
    never more than 11/9 of the bins of the best packing, and four more. A function of the lengths
    alone. Raises ValueError for an item longer than `room`.
    """
    bins: list[list[int]] = []
    of_room: list[list[int]] = [[] for _ in range(room + 1)]  # bins by the room that is left
    rooms: list[int] = []  # those that some bin has, ascending
    for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        length = lengths[item]
        if length > room:
            raise ValueError(f"item {item} of length {length} does not fit into {room}")
        at = bisect.bisect_left(rooms, length)
        if at == len(rooms):
            number, left = len(bins), room
            bins.append([])
        else:
            left = rooms[at]
            number = of_room[left].pop()
            if not of_room[left]:
                del rooms[at]
        bins[number].append(item)
        left -= length
        if not of_room[left]:
            bisect.insort(rooms, left)
        of_room[left].append(number)
    return bins
