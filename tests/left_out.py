"""What the suite leaves out for the time that it takes, and ``make test-cuts`` runs: others show the same."""

import os

VARIABLE = "VMSNAP_ALL_CUTS"
EVERYWHERE = bool(os.environ.get(VARIABLE))
"""Whether nothing is to be left out."""
