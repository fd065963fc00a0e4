"""How many GPUs one SageMaker instance has. The SDK's own table ends before g6e, p5en and p6."""

from __future__ import annotations

_G4 = {"xlarge": 1, "2xlarge": 1, "4xlarge": 1, "8xlarge": 1, "16xlarge": 1, "12xlarge": 4}
_G5 = {**_G4, "24xlarge": 4, "48xlarge": 8}
GPUS: dict[str, dict[str, int]] = {
    "g4dn": _G4,  # T4, 16 GB each
    "g5": _G5,  # A10G, 24 GB
    "g6": _G5,  # L4, 24 GB
    "g6e": _G5,  # L40S, 48 GB
    "g7e": {"2xlarge": 1, "4xlarge": 1, "8xlarge": 1, "12xlarge": 2, "24xlarge": 4, "48xlarge": 8},  # 96 GB
    "p4d": {"24xlarge": 8},  # A100, 40 GB
    "p4de": {"24xlarge": 8},  # A100, 80 GB
    "p5": {"4xlarge": 1, "48xlarge": 8},  # H100, 80 GB
    "p5e": {"48xlarge": 8},  # H200, 141 GB
    "p5en": {"48xlarge": 8},  # H200, 141 GB
    "p6-b200": {"48xlarge": 8},  # B200
    "p6-b300": {"48xlarge": 8},  # B300
}
"""Family -> size -> GPUs. Not listed: p2 and p3, whose GPUs the current CUDA 13 images no longer drive."""

CPU_FAMILIES = ("m5", "m5d", "m6i", "m6id", "m7i", "c5", "c5d", "c6i", "c6id", "c7i", "r5", "r5d", "r6i", "r7i", "t3")


def gpus_of(instance_type: str, given: int | None = None) -> int:
    """GPUs of one `ml.FAMILY.SIZE`; `given` is what the caller says they are, and counts where it is not None.

    Raises ValueError for a name that is none, and for a type that this table does not know.
    """
    parts = instance_type.split(".")
    if len(parts) != 3 or parts[0] != "ml":
        raise ValueError(f"instance_type `{instance_type}` is none: write it as in ml.g6e.4xlarge.")
    if given is not None:
        return given
    if parts[1] in CPU_FAMILIES:
        return 0
    count = GPUS.get(parts[1], {}).get(parts[2])
    if count is None:
        raise ValueError(f"instance_type `{instance_type}` is not known here: say with gpus how many GPUs one has.")
    return count
