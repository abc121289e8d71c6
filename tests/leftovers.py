"""What killed processes leave beside the files that they were writing."""

import subprocess
import sys
from pathlib import Path

from blipfit import file_writes


def leave_temporary_folder(target: Path, pid: int | None = None, host: str | None = None) -> Path:
    """Create the temporary folder of a half-written `target`; by default of a process that has ended here."""
    if pid is None:
        ended = subprocess.Popen([sys.executable, "-c", ""])
        ended.wait()
        pid = ended.pid
    folder = target.with_name(f".{target.name}.{host or file_writes._host()}-{pid}-k1ll3d_0")
    folder.mkdir(parents=True)
    (folder / target.name).write_text("half")
    return folder
