"""Rates at which devices work: those of the data sheets, or measured ones from a file.

The file is JSON with `source`, a sentence that says where the numbers come from, and any of the
other fields of `Rates`. `tools/device_check` writes one on the machine that it runs on.
"""

from __future__ import annotations

import json
import pathlib
from typing import NamedTuple

import msgspec

from atlas_jax.plan.targets import Device

PUBLISHED = "published"
"""Source of the data sheets' numbers."""


class _RatesFile(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Fields of a file of rates; those that it does not have are the data sheet's."""

    source: str
    products: float = 0
    attention_forward: float = 0
    attention_backward: float = 0
    masked_attention_forward: float = 0
    masked_attention_backward: float = 0
    packed_attention_forward: float = 0
    packed_attention_backward: float = 0
    memory: float = 0
    link: float = 0
    network: float = 0
    launch_secs: float = 0


class Rates(NamedTuple):
    """Operations or bytes a second, by the kind of kernel."""

    source: str
    """`published`, or where the numbers were measured."""
    flops: dict[str, float]
    """FLOPs a second of `products`, and of attention by its name in the file."""
    memory: float
    """Bytes a second of device memory."""
    link: float
    """Bytes a second to devices of the same host or slice."""
    network: float
    """Bytes a second to devices of other hosts."""
    launch_secs: float
    """Least time of a kernel, in seconds."""


_LAUNCH_SECS = 2e-6
"""Least time of a kernel on a GPU: the driver starts the next one no faster."""
_KINDS = (
    "products", "attention_forward", "attention_backward", "masked_attention_forward",
    "masked_attention_backward", "packed_attention_forward", "packed_attention_backward",
)  # fmt: skip


def published(device: Device) -> Rates:
    """Returns the rates of a device's data sheet."""
    return Rates(
        source=PUBLISHED,
        flops=dict.fromkeys(_KINDS, device.peak_flops),
        memory=device.memory_bandwidth,
        link=device.link_bandwidth,
        network=device.network_bandwidth,
        launch_secs=_LAUNCH_SECS,
    )


def read(path: str, device: Device) -> Rates:
    """Returns the rates of a file, completed by the data sheet's.

    Attention with a mask or with packed rows that the file does not have runs at the rate of plain
    attention.

    Raises:
        ValueError: if the file is none of rates.
    """
    try:
        values = json.loads(pathlib.Path(path).read_text())
        measured = msgspec.convert(values, _RatesFile)
    except (json.JSONDecodeError, msgspec.ValidationError) as error:
        raise ValueError(
            f"{path} is no file of rates ({error}); take one that tools/device_check has written"
        ) from None
    sheet = published(device)
    flops = {kind: getattr(measured, kind) or sheet.flops[kind] for kind in _KINDS}
    for direction in ("attention_forward", "attention_backward"):
        for variant in ("masked", "packed"):
            if not getattr(measured, f"{variant}_{direction}"):
                flops[f"{variant}_{direction}"] = flops[direction]
    missing = [k for k in ("products", "attention_forward", "memory") if not getattr(measured, k)]
    note = f"; published: {', '.join(missing)}" if missing else ""
    return Rates(
        source=measured.source + note,
        flops=flops,
        memory=measured.memory or sheet.memory,
        link=measured.link or sheet.link,
        network=measured.network or sheet.network,
        launch_secs=measured.launch_secs or sheet.launch_secs,
    )
