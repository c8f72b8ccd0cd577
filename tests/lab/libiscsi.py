"""Logs in to a target by libiscsi, as QEMU does (it comes with ``qemu-block-extra``), but with CHAP of both ways, which
QEMU does not ask for: the target has to show who it is, too.
"""

import ctypes

_LIBRARY = "libiscsi.so.7"
_NORMAL_SESSION = 2


def log_in(address: str, initiator: str, account: tuple[str, str], shown: tuple[str, str]) -> str:
    """What keeps an initiator of that name from a LUN, as libiscsi has it; empty where it is let in.

    :param account: by which it is let in, and its secret
    :param shown: the account by which the target has to show who it is, and the secret that it has to know
    """
    library = ctypes.CDLL(_LIBRARY)
    library.iscsi_create_context.restype = ctypes.c_void_p
    library.iscsi_get_error.restype = ctypes.c_char_p
    portal, target, lun = address.removeprefix("iscsi://").split("/")
    context = ctypes.c_void_p(library.iscsi_create_context(initiator.encode()))
    try:
        library.iscsi_set_targetname(context, target.encode())
        library.iscsi_set_session_type(context, _NORMAL_SESSION)
        library.iscsi_set_initiator_username_pwd(context, *(word.encode() for word in account))
        library.iscsi_set_target_username_pwd(context, *(word.encode() for word in shown))
        if library.iscsi_full_connect_sync(context, portal.encode(), int(lun)):
            return str(library.iscsi_get_error(context).decode(errors="replace"))
        library.iscsi_logout_sync(context)
        return ""
    finally:
        library.iscsi_destroy_context(context)
