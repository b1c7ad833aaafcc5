"""The package's logger: messages on stderr, results never."""

from __future__ import annotations

import functools
import logging

from tvm_gdn import env


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning the first time that it is given."""
    logging.getLogger("tvm_gdn").warning(message)


def configure() -> None:
    """Give the package's logger a handler of its own, unless the application configured one."""
    logger = logging.getLogger("tvm_gdn")
    if not logger.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("tvm_gdn: %(message)s"))
        logger.addHandler(handler)
    level = logging.getLevelName(env.log_level())
    logger.setLevel(level if isinstance(level, int) else logging.INFO)
