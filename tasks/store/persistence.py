"""Persistence: what an object store refuses for a moment is asked for again, until its outage lasted too long.

`persist` waits between tries with exponential backoff and full jitter, so that many workers do not come back at once. botocore
tries a single request a few times by itself (`s3`); what is here covers every backend, torn bodies, and outages of a minute.
"""

import errno
import logging
import os
import random
import time
from collections.abc import Callable
from typing import TypeVar

from tasks.errors import DarkroomError
from tasks.store.errors import StoreUnreachable

PATIENCE_S = 75.0  # from the first failure on; longer than a node's or a proxy's restart
LEAST_TRIES = 3  # however long one takes: an upload of minutes that fails late still gets its second chance
FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 10.0
TELL_AFTER_S = 10.0  # a short hiccup is no news

BACKENDS = {"aiobotocore", "aiohttp", "azure", "botocore", "gcsfs"}  # whose network errors are no OSError
# botocore's errors that are the network's; all others are about parameters and credentials
_BOTOCORE = {
    "HTTPClientError",
    "ConnectionError",
    "IncompleteReadError",
    "ResponseParserError",
    "CredentialRetrievalError",
}
# answers below 500 that may be others the next time: a body or an upload that was torn, and being in each other's way
_PASSING_STATUS = {408, 409, 425, 429}
_PASSING_CODES = {"BadDigest", "IncompleteBody", "NoSuchUpload", "RequestTimeout", "XAmzContentSHA256Mismatch"}
_LASTING = {
    errno.EDQUOT,
    errno.EINVAL,
    errno.EISDIR,
    errno.EMSGSIZE,
    errno.ENAMETOOLONG,
    errno.ENOSPC,
    errno.ENOSYS,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
}

log = logging.getLogger(__name__)
T = TypeVar("T")


def persist(operation: Callable[[], T], what: str, patience_s: float = PATIENCE_S) -> T:
    """The operation's result, tried again on what may pass until `patience_s` after its first failure.

    `what` names it in errors, such as "read s3://bucket/key". What will not pass comes at once: Python's own errors as they are,
    a network library's (no credentials) as StoreUnreachable. That one is not tried again by whoever called: it has been.
    """
    tries, first = 0, 0.0
    told = False
    while True:
        try:
            return operation()
        except Exception as error:
            if not may_pass(error):
                if not of_backend(error):
                    raise
                raise StoreUnreachable(
                    f"could not {what}: the store could not be asked, {kind(error)}",
                    "are its address (AWS_ENDPOINT_URL), the region and the credentials (AWS_ACCESS_KEY_ID, "
                    "AWS_SECRET_ACCESS_KEY; or those of the other clouds) in the environment?",
                ) from error
            now = time.monotonic()
            tries, first = tries + 1, first or now
            if now - first >= patience_s and tries >= LEAST_TRIES:
                raise StoreUnreachable(
                    f"could not {what}: tried {tries} times in {now - first:.0f} s, the last time {kind(error)}",
                    "what was finished is kept: see whether the store is up and reachable from here, and start the same "
                    "command again, it goes on from there",
                ) from error
            log.debug("could not %s: %s; trying again", what, kind(error))
            if now - first >= TELL_AFTER_S and not told:
                told = True
                log.warning(
                    "the store does not answer: could not %s for %.0f s (%s); trying again until %.0f s are over",
                    what,
                    now - first,
                    kind(error),
                    patience_s,
                )
        time.sleep(random.uniform(0, min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** min(tries, 10))))


def may_pass(error: BaseException) -> bool:
    """Whether a failure may go away by itself: the network's and the disk's may; what is refused or not there will not.

    StoreUnreachable will not: `persist` has waited for it, and a step that waited again would only multiply its patience.
    """
    if isinstance(error, DarkroomError | FileExistsError | PermissionError):
        return False
    status, code = answer(error)
    if code in _PASSING_CODES:
        return True
    if isinstance(error, FileNotFoundError):
        return False
    if status is not None and status >= 400:
        return (status >= 500 and status != 501) or status in _PASSING_STATUS
    if isinstance(error, OSError):
        return error.errno not in _LASTING
    if type(error).__module__.startswith("botocore"):
        return not _BOTOCORE.isdisjoint(ancestor.__name__ for ancestor in type(error).__mro__)
    return of_backend(error)


def of_backend(error: BaseException) -> bool:
    """Whether it is a network library's own error, about the network, credentials or parameters."""
    return not isinstance(error, OSError) and type(error).__module__.partition(".")[0] in BACKENDS


def answer(error: BaseException) -> tuple[int | None, str]:
    """The HTTP status and the S3 error code the store answered with, where it did."""
    for candidate in (error, error.__cause__):
        response = getattr(candidate, "response", None)
        if isinstance(response, dict):  # botocore's ClientError, which s3fs translates and keeps as the cause
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return status, str(response.get("Error", {}).get("Code", ""))
    # of azure, aiohttp, gcsfs; aiohttp's parser has a `code` too, which is no answer: 400 for a body that was torn
    names = ["status_code", "status"] + ["code"] * type(error).__module__.startswith("gcsfs")
    for name in names:
        if isinstance(status := getattr(error, name, None), int):
            return status, ""
    return None, ""


def was_tried_again(error: BaseException) -> bool:
    """Whether botocore had sent the request more than once when it got this answer, so that an earlier one may have counted."""
    for candidate in (error, error.__cause__):
        response = getattr(candidate, "response", None)
        if isinstance(response, dict):
            return bool(response.get("ResponseMetadata", {}).get("RetryAttempts"))
    return False


def kind(error: BaseException) -> str:
    """A failure in a few words without its message, which may hold the endpoint or a signed address."""
    status, code = answer(error)
    if status is not None:
        return f"with answer {status}" + (f" ({code})" if code and code != str(status) else "")
    if isinstance(error, OSError) and error.errno:
        return f"with {type(error).__name__} ({os.strerror(error.errno)})"
    return f"with {type(error).__name__}"
