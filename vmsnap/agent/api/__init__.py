"""The HTTP API: ``/api/v1``, the metrics, and the page. Imported only where the extra ``agent`` is installed."""
