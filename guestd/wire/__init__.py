"""Between guestd's own words and the wire."""

import os

# gRPC's core writes to stderr past every logger, a line for each stranger who fails TLS, with words of theirs. It reads
# this when it is imported, which is after this package.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
