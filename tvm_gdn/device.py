"""What torch says about the accelerator that is present; CPUs are `target.host_features`."""

from __future__ import annotations

import functools
from typing import Any

import torch


@functools.cache
def architecture(kind: str) -> str | None:
    """Architecture of the first device of a torch device type.

    Parameters
    ----------
    kind : str
        Torch device type, such as ``"cuda"``.

    Returns
    -------
    str or None
        The compute capability as ``"9.0"``, or the name of the instruction set where torch knows one (``"gfx942"``); None
        where no such device is present. Machines with devices of several architectures are served by the first one's.
    """
    backend: Any = getattr(torch, kind, None)
    if backend is None or not hasattr(backend, "get_device_properties") or not backend.is_available():
        return None
    properties = backend.get_device_properties(0)
    # Builds for compute capabilities have the field too, with the device's name in it.
    if torch.version.hip is not None:
        return str(properties.gcnArchName).partition(":")[0]
    return f"{properties.major}.{properties.minor}"


def name(kind: str) -> str | None:
    """Name of the first device of a torch device type, or None."""
    return None if architecture(kind) is None else str(getattr(torch, kind).get_device_properties(0).name)


def synchronize(kind: str) -> None:
    """Wait for a device type's work; nothing for CPUs."""
    if kind != "cpu":
        getattr(torch, kind).synchronize()
