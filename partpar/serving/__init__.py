r"""A share that answers others: the remote service and its transport, and the stores."""

from partpar.serving.service import Service
from partpar.serving.start import start_service

__all__ = ["Service", "start_service"]
