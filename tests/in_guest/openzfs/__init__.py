"""Tests on OpenZFS, in the storage guest: not part of the suite, since building OpenZFS takes ten minutes. See
``make test-openzfs``.
"""
