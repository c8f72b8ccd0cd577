"""What the suite leaves out for the time that it takes, and ``make test-cuts`` runs: others show the same."""

import os

EVERYWHERE = bool(os.environ.get("VMSNAP_ALL_CUTS"))
"""Whether nothing is to be left out."""
