"""What obstore does not read by itself: the keys of an AWS profile, and passwords of web servers from ~/.netrc. And
whether keys are new since they were read.

From the environment obstore takes all credentials of AWS_*, GOOGLE_* and AZURE_*. These it renews by itself before they
end: a web identity (AWS_WEB_IDENTITY_TOKEN_FILE), the task's or pod's (AWS_CONTAINER_CREDENTIALS_*), the machine's (the
metadata server), and everything of Google and of Azure but a SAS token. Keys that stand in the environment or in a file
(AWS_ACCESS_KEY_ID with AWS_SESSION_TOKEN, ~/.aws/credentials) it uses until they end.
"""

import configparser
import netrc
import os
from pathlib import Path

from pipelines.errors import DataError

_PREFIXES = ("AWS_", "GOOGLE_", "AZURE_")
_OTHER_SOURCES = (  # of AWS credentials: where one is set, no profile is read
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_SKIP_SIGNATURE",
)
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT")
_KEYS = {
    "aws_access_key_id": "access_key_id",
    "aws_secret_access_key": "secret_access_key",
    "aws_session_token": "session_token",
    "region": "region",
}


def profile_options() -> dict[str, str]:
    """Keys and region of the AWS profile, as options of an `obstore.store.S3Store`; empty if none is to be used.

    Raises:
        DataError: the profile named by AWS_PROFILE has no keys, or a file is damaged.
    """
    if any(os.environ.get(name) for name in _OTHER_SOURCES):
        return {}
    profile = os.environ.get("AWS_PROFILE") or "default"
    credentials = Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials").expanduser()
    config = Path(os.environ.get("AWS_CONFIG_FILE") or "~/.aws/config").expanduser()
    found = _section(config, profile if profile == "default" else f"profile {profile}") | _section(credentials, profile)
    options = {ours: found[theirs] for theirs, ours in _KEYS.items() if found.get(theirs)}
    if os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"):
        options.pop("region", None)
    if "access_key_id" not in options and os.environ.get("AWS_PROFILE"):
        raise DataError(
            f"AWS_PROFILE={profile}: no aws_access_key_id in {credentials}; of a profile only its keys are read: for "
            "others, set what `aws configure export-credentials --format env` prints"
        )
    return options


def web_user(host: str) -> tuple[str, str] | None:
    """Name and password for a web server in ~/.netrc, or in the file that NETRC names; None: there are none.

    Raises:
        DataError: the file is damaged.
    """
    path = _netrc_path()
    is_damaged = False
    try:
        found = netrc.netrc(str(path)).authenticators(host)
    except OSError:
        return None
    except (netrc.NetrcParseError, UnicodeError):  # its message may hold the line
        found, is_damaged = None, True
    if is_damaged:
        raise DataError(f"{path}: not a .netrc file: its lines are `machine HOST login NAME password PASSWORD`")
    return (found[0], found[2] or "") if found else None


def uses_plain_http() -> bool:
    """Whether the environment names an endpoint without TLS."""
    return any(os.environ.get(name, "").lower().startswith("http://") for name in _ENDPOINTS)


def snapshot() -> tuple[object, ...]:
    """What the credentials are made from, to see whether it has changed; never to be printed."""
    variables = sorted((name, value) for name, value in os.environ.items() if name.startswith(_PREFIXES))
    try:
        profile = profile_options()
    except DataError:
        profile = {}
    files = (os.environ.get("GOOGLE_APPLICATION_CREDENTIALS"), str(_netrc_path()))
    return *variables, *sorted(profile.items()), *map(_changed_ns, files)


def _netrc_path() -> Path:
    return Path(os.environ.get("NETRC") or "~/.netrc").expanduser()


def _section(path: Path, name: str) -> dict[str, str]:
    parser = configparser.RawConfigParser(strict=False)
    try:
        parser.read(path, encoding="utf-8")
    except (configparser.Error, UnicodeError):  # its message holds the line
        is_damaged = True
    else:
        is_damaged = False
    if is_damaged:
        raise DataError(f"{path}: not a file of AWS profiles; write it again with `aws configure`")
    return dict(parser[name]) if parser.has_section(name) else {}


def _changed_ns(path: str | None) -> int:
    try:
        return os.stat(path).st_mtime_ns if path else 0
    except OSError:
        return 0
