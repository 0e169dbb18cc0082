"""Files are replaced whole or not at all."""

import os
from pathlib import Path
from uuid import uuid4


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside `path` and move into place, so that nobody ever sees half a file.

    Opened in the ordinary way, since the files of `tempfile` are for their owner alone: the umask
    decides who may read this one.
    """
    beside = path.with_name(f"{path.name}.{uuid4().hex}")
    try:
        with beside.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
