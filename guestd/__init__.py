"""guestd: virtual machines without a fixed size."""

__version__ = "0.1.0"
