"""Objects as files on an SFTP server."""

from vmsnap_storage_backends.sftp.storage import SftpStorage

__all__ = ["SftpStorage"]
