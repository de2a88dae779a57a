"""What a failed request means: a reason without secrets, and whether another try is of use."""

import os
import re
from dataclasses import dataclass

_MAX_ASKED_WAIT_S = 120.0
_RETRIED = (408, 425, 429)  # and 5xx
EXISTS = 409
REASONS = {
    400: "the server does not understand the request (400)",
    401: "not allowed (401): check the credentials",
    403: "not allowed (403): check the credentials and the object's name",
    404: "no such object",
    412: "has changed since its manifest was written",
    EXISTS: "exists already",
}
_ENDED = "the credentials have ended: renew them and start again"
NO_CONNECTION = "no connection"
TOO_SHORT = "is shorter than the manifest says"
_NO_RANGES = "the server does not serve ranges of a file: use one that does"
# Parts of obstore's messages, which has no classes for these.
_FINAL_TEXTS = {
    "StartTooLarge": TOO_SHORT,
    "NotPartial": _NO_RANGES,
    "NoContentRange": _NO_RANGES,
    "Range request not supported": _NO_RANGES,
    "UnexpectedRange": "the server serves other ranges than asked for: use one that does",
    "MissingContentLength": "the server does not say how long the object is: use one that does",
    "BareRedirect": "the bucket is in another region: set AWS_REGION",
}
_STATUS = re.compile(r"status code: (\d{3})")
_RETRY_AFTER = re.compile(r"retry[-_ ]?after\D{1,5}(\d{1,4})", re.IGNORECASE)
_SYSTEM_ERROR = re.compile(r"Os \{\s+code: (\d{1,3}),")
_METADATA_SERVER = re.compile(r"//(169\.254\.\d+\.\d+|metadata\b|\[?fd00:ec2)")


@dataclass(frozen=True)
class Failure:
    """Why a request failed.

    Attributes:
        reason: In words.
        is_final: Whether another try is of no use.
        status: Of the answer; 0: unknown.
        has_ended: Whether the credentials have ended.
        asked_wait_s: How long the server asks to wait; 0: unknown.
    """

    reason: str
    is_final: bool = True
    status: int = 0
    has_ended: bool = False
    asked_wait_s: float = 0.0


def failure_of(error: Exception, *, is_local: bool) -> Failure:
    """What obstore's error means; its message, which may hold secrets, is looked at but not kept."""
    from obstore import exceptions

    text = str(error)
    message = text.partition("\n\nDebug source")[0]
    has_ended = "ExpiredToken" in text or "TokenRefreshRequired" in text
    match error:
        case FileNotFoundError():
            return Failure(REASONS[404], status=404)
        case exceptions.PreconditionError():
            return Failure(REASONS[412], status=412)
        case exceptions.AlreadyExistsError():
            return Failure(REASONS[EXISTS], status=EXISTS)
        case NotImplementedError():
            return Failure("the server cannot create only where nothing is: use object storage", status=501)
        case exceptions.InvalidPathError():
            return Failure("not a name of an object")
    if _METADATA_SERVER.search(message):
        reason = "no credentials: none in the environment, and the metadata server of the machine gives none"
        return Failure(reason, is_final=False, status=401)
    found = _STATUS.search(message)
    status = int(found[1]) if found else 0
    if has_ended:
        return Failure(_ENDED, status=status, has_ended=True)
    if isinstance(error, exceptions.UnauthenticatedError):
        return Failure(REASONS[401], status=401)
    if isinstance(error, exceptions.PermissionDeniedError | PermissionError):
        return Failure(REASONS[403], status=403)
    for part, reason in _FINAL_TEXTS.items():
        if part in text:
            return Failure(reason)
    if is_local:
        return Failure("cannot be read or written")
    if status == 416:
        return Failure(TOO_SHORT, status=status)
    if 300 <= status < 400:
        return Failure(f"is somewhere else ({status}): name the address that the server leads to", status=status)
    if status:
        asked = _RETRY_AFTER.search(text) if status in (429, 503) else None
        return Failure(
            REASONS.get(status, f"status {status}"),
            is_final=status < 500 and status not in _RETRIED,
            status=status,
            asked_wait_s=min(float(asked[1]), _MAX_ASKED_WAIT_S) if asked else 0.0,
        )
    if isinstance(error, ValueError):
        return Failure("not a name of an object")
    if "TimedOut" in text or "kind: Timeout" in text:
        return Failure("no answer in time", is_final=False)
    if "kind: Connect" in text:
        code = _SYSTEM_ERROR.search(text)
        return Failure(
            f"{NO_CONNECTION} ({os.strerror(int(code[1])).lower()})" if code else NO_CONNECTION, is_final=False
        )
    return Failure("connection cut", is_final=False)
