"""Giving up root, for good."""

import os


def drop_privileges(user: str) -> None:
    """Become `user` for good, without groups and without capabilities.

    :raise KeyError: When there is no such user.
    :raise RuntimeError: When root could be had back.
    """
    import pwd

    entry = pwd.getpwnam(user)
    if entry.pw_uid == 0 or entry.pw_gid == 0:
        raise RuntimeError(f"{user} is root: no user for the daemon")
    os.setgroups([])
    os.setresgid(entry.pw_gid, entry.pw_gid, entry.pw_gid)
    os.setresuid(entry.pw_uid, entry.pw_uid, entry.pw_uid)
    try:
        os.setuid(0)
    except PermissionError:
        return
    raise RuntimeError("root could be had back after giving it up")
