"""Read what TensorBoard reads, without TensorBoard."""

import struct
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Give step and value of each scalar, by its tag.

    An event file is a row of records: length (8 bytes), check sum of it (4), an Event, check sum of that (4).
    """
    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(directory.iterdir()):
        content = path.read_bytes()
        at = 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + length])
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
            at += 16 + length
        assert at == len(content), f"{path} ends within a record"
    return found
