"""The hub of Hugging Face: whether it answers, before a library that waits for minutes is asked for something on it.

Where it does not, its libraries are told to be offline: what they have stored on this machine before is used, and
what they have not is an error at once.
"""

from __future__ import annotations

import logging
import os
import ssl
import sys
import urllib.error
import urllib.request

logger = logging.getLogger(__name__)

OFFLINE = "HF_HUB_OFFLINE"
"""The variable by which the libraries are told to be offline."""

HUB = "https://huggingface.co"

PATIENCE_S = 10.0


def hub_problem() -> str | None:
    """Why nothing can be had from the hub, in words; None: it answers. Its libraries are offline if it does not."""
    if os.environ.get(OFFLINE, "").upper() in ("1", "ON", "YES", "TRUE"):
        return f"{OFFLINE} is set, so that it is not asked"
    endpoint = os.environ.get("HF_ENDPOINT") or HUB
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=PATIENCE_S).close()
    except (urllib.error.HTTPError, ssl.SSLError):  # it answers; certificates are the libraries' affair
        return None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLError):
            return None
        _go_offline()
        return f"{endpoint} does not answer ({reason})"
    return None


def _go_offline() -> None:
    """Tell the libraries, those too that have read the variable already."""
    logger.info("the hub does not answer: %s is set", OFFLINE)
    os.environ[OFFLINE] = "1"
    for name in ("huggingface_hub.constants", "datasets.config"):
        if (module := sys.modules.get(name)) is not None:
            setattr(module, OFFLINE, True)
