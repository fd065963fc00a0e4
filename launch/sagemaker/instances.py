"""How many GPUs one SageMaker instance has. The SDK's own table ends before g6e, p5en and p6."""

from __future__ import annotations

_SIZES = {
    **dict.fromkeys(("g4dn", "g5", "g6", "g6e"), {"12xlarge": 4, "24xlarge": 4, "48xlarge": 8}),
    "g7e": {"12xlarge": 2, "24xlarge": 4, "48xlarge": 8},
    **dict.fromkeys(("p4d", "p4de"), {"24xlarge": 8}),
    **dict.fromkeys(("p5", "p5e", "p5en", "p6-b200", "p6-b300"), {"48xlarge": 8}),
}
"""Family -> sizes with several GPUs; the others of these families have one."""


def gpus_of(instance_type: str) -> int | None:
    """GPUs of one `ml.FAMILY.SIZE`; None where this table does not know the family."""
    _, _, kind = instance_type.partition(".")
    family, _, size = kind.partition(".")
    if family in _SIZES:
        return _SIZES[family].get(size, 1)
    return None if family[:1] in ("g", "p") else 0
