"""The storage backend ``s3``: any service that speaks Amazon's S3 protocol."""

from vmsnap_storage_backends.s3.backend import S3Storage

__all__ = ["S3Storage"]
