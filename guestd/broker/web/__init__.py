"""What the broker says over HTTP, to browsers on the same host: a read-only page of the guests, live."""
