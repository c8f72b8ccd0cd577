"""Real storage servers, started by the tests on the loopback and gone after them."""
