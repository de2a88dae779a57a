"""How many files this process may have open."""

import resource

from fastssl.errors import UserError

NEEDED = 64  # a training in one process opens about 21 at a time; connections to further processes add to them


def allow_open_files() -> None:
    """Raise this process's limit where it is too low; libraries abort the process at a file that they cannot open.

    Raises:
        UserError: The hard limit is too low as well.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= NEEDED:
        return
    if hard != resource.RLIM_INFINITY and hard < NEEDED:
        raise UserError(f"this process may open only {hard} files, at least {NEEDED} are needed: ulimit -n 65536")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
