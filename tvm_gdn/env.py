"""Every environment variable that the package reads, in one place (README lists them)."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import platformdirs

__all__ = ["cache_dir", "checks_enabled", "jit_disabled", "log_level", "pack_path", "target_name", "without_effect"]

_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off"})
_FLAGS = ("TVM_GDN_DISABLE_JIT", "TVM_GDN_CHECKS")


def _flag(name: str, default: bool) -> bool:
    value = os.environ.get(name, "").strip().lower()
    return default if not value else value in _TRUE


def target_name() -> str:
    """`TVM_GDN_TARGET`: the target of calls on its device type; one that cannot be served raises. Default ``auto``."""
    return os.environ.get("TVM_GDN_TARGET", "auto") or "auto"


def cache_dir() -> Path:
    """`TVM_GDN_CACHE_DIR`: compiled kernels, locks, tuning studies and records of this user."""
    value = os.environ.get("TVM_GDN_CACHE_DIR")
    return Path(value) if value else Path(platformdirs.user_cache_dir("tvm_gdn", appauthor=False))


def pack_path() -> list[Path]:
    """`TVM_GDN_PACK_PATH`: folders with packs, searched before the cache's own ``packs`` folder."""
    value = os.environ.get("TVM_GDN_PACK_PATH", "")
    return [Path(part) for part in value.split(os.pathsep) if part]


def jit_disabled() -> bool:
    """`TVM_GDN_DISABLE_JIT=1`: never compile during a call; a kernel that neither a pack nor the cache holds is an error."""
    return _flag("TVM_GDN_DISABLE_JIT", default=False)


def checks_enabled() -> bool:
    """`TVM_GDN_CHECKS=1`: check slot indices and cu_seqlens on accelerators too, which synchronizes the device."""
    return _flag("TVM_GDN_CHECKS", default=False)


def log_level() -> str:
    """`TVM_GDN_LOG`: level of the package's logger on stderr. Default ``INFO``."""
    return os.environ.get("TVM_GDN_LOG", "INFO").upper() or "INFO"


def without_effect() -> dict[str, str]:
    """Variables whose values mean nothing, so that the default holds, and what is allowed."""
    given = {name: os.environ.get(name, "").strip().lower() for name in _FLAGS}
    found = {name: "0 or 1" for name, value in given.items() if value and value not in _TRUE | _FALSE}
    if not isinstance(logging.getLevelName(log_level()), int):
        found["TVM_GDN_LOG"] = "DEBUG, INFO, WARNING or ERROR"
    return found
