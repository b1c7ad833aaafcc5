"""Exceptions of the package: each message names the argument, what is allowed, and what to do next."""

from __future__ import annotations


class TvmGdnError(Exception):
    """Base class of every error that the package raises on purpose."""


class ArgumentError(TvmGdnError, ValueError):
    """An argument of an operator, a command or a descriptor has a value that is not allowed."""


class ArgumentTypeError(TvmGdnError, TypeError):
    """An argument has the wrong type (not a tensor, a wrong dtype, a wrong device)."""


class TargetError(TvmGdnError, ValueError):
    """A target is unknown, malformed, or cannot run on this machine."""


class PackError(TvmGdnError, RuntimeError):
    """A pack is missing, damaged, or was built for other software or hardware."""


class BuildError(TvmGdnError, RuntimeError):
    """A kernel could not be compiled."""


class KernelError(TvmGdnError, RuntimeError):
    """A compiled kernel refused a call for a reason that the argument checks do not know."""


class TuneError(TvmGdnError, RuntimeError):
    """A tuning run could not measure anything."""
